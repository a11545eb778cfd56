"""What ``kms doctor`` looks at, a module for each place; they read, and change nothing."""
