"""What is collected here, unless it is named."""

collect_ignore = ["with_tensorflow.py"]  # an extra has what it imports
