//! Types of the public HTTP API and of the agent protocol. Types and nothing else.

pub mod agent;
