"""What people look at: pages and charts."""
