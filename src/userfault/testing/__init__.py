"""Things for tests of programs that use userfault, and of userfault itself."""
