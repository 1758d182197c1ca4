"""fastattn inside other libraries; importing a module of it does nothing to them."""
