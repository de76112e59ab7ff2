"""The families that ship, one file each, registered by entry point like a third party's."""
