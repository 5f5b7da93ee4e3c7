"""The network. It knows its resident experts and nothing of other sites."""
