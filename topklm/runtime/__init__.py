"""The process itself: signals, memory allocator, compiled programs kept, and a watchdog for hangs."""
