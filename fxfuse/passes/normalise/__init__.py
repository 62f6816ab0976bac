"""The canonical form of a graph: one dialect, writes as edges, sizes known, no identities in the stream."""
