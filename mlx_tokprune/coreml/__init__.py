"""The pruned vision path as a Core ML package, and such a package as a vision path."""
