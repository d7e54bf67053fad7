"""What is trained: building the model, its weights on the disk, its loss, its optimizer and learning rate.

Nothing here knows how many processes there are, or how the model is replicated or sharded; but `weights` asks a
parameter which part of it this rank has.
"""
