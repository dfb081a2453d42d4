"""One small experiment per paper."""
