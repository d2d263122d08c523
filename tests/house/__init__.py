"""The house itself: lengths, walls around private torch, the wheel, documents and examples."""
