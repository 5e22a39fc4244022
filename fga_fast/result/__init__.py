"""What an explanation is, and how to look at it, keep it and read it back."""
