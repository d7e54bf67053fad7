"""What is trained: building the model, its loss, its optimizer and learning rate.

Nothing here knows how many processes there are, or how the model is replicated or sharded.
"""
