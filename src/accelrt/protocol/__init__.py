"""What both ends of an Open Inference Protocol connection mean by the same bytes: datatypes and messages."""
