"""The ops, one folder a room: attention, norm, ffn."""
