"""Every private API of torch that fxfuse uses, one file for each part of torch, and nothing else.

Each file says why no public API serves, and on which versions of torch it was seen to work; all names are there in
2.11.0 too. When torch changes what is its own, this room is what has to be mended. Imports no other room.
`tests/_torch` keeps private APIs out of all others.
"""
