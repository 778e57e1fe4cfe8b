"""The Hugging Face hub, asked once and for seconds: `asking` does it, `refusal` says what it would not give."""
