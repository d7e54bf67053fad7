"""What is trained: building the model, its weights on the disk, its loss, its optimizer and learning rate.

What computes here does not know how many processes there are, or how the model is replicated or sharded; but `weights`
asks a parameter which part of it this rank has, `muon` brings a matrix together that is shared, and `context_parallel`
exchanges the pieces of a row. `memory`, `activations` and `exchange` say of any number of ranks what each will need and
send.
"""
