"""What tests need and users may use: model builders, a fake backend, the contract suite to inherit."""
