//! The whole server on scratch directories, spoken to as administrators and hosts speak to it.

mod agent;
mod api;
mod broker;
mod gate;
mod providers;
mod rig;
mod secrets;
mod tasks;
