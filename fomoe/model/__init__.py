"""The network. It knows its resident experts and never that other sites exist."""
