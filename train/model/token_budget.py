"""Limits of the token budget that `--max-tokens auto` chooses."""

# Share of a device that may be filled. The rest stays free for fragmentation, other libraries' workspaces, and the
# spread of row lengths.
USED = 0.85

# A pass of fewer tokens leaves a GPU idle for part of its time.
FEW_TOKENS = 4096

# More tokens than this in one pass make no GPU faster, and cost padding.
MOST_TOKENS = 65_536
