//! The receiver from outside: real listeners on loopback, real TLS, real rows.

mod doors;
mod enrolment;
mod rest;
mod sessions;
mod world;
