"""Run folders: the card, who may write where, how a finished one is opened, what commands give back."""
