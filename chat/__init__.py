"""Conversations: from the columns of a record to messages, and from messages to text.

shapes knows every shape that a record may have: a new one gets its place there. messages reads every spelling of a
message. template renders the messages and finds what of the text is trained on. traces checks that no message is lost.
Nothing here reads files or options, or makes tokens: that is data/.
"""
