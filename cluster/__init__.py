"""The ground: configuration, messages, placement, table, controller. Imports no torch."""
