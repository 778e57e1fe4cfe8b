"""What people see and type: messages, bars, numbers in words, arguments, and how a command ends."""
