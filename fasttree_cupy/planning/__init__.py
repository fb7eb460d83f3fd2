"""Planning: from a KV tree to the arrays that execution follows."""
