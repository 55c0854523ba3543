"""The reference backend: runs any KernelSpec with torch. The oracle for the others, and the last resort."""
