//! Fault loop, block table, residency, drain and resolvers.
