"""What `bwsk-fx inspect` reads: models by name, by factory and as exported programs, and what it shows of them."""
