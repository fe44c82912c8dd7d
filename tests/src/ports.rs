//! Free ports on loopback.

use std::net::TcpListener;

/// So many ports that nobody listens on at this moment, all different.
pub fn free<const COUNT: usize>() -> [u16; COUNT] {
    // Held until all are found.
    let held: [TcpListener; COUNT] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    held.map(|listener| listener.local_addr().expect("an address").port())
}

/// Whether somebody listens.
pub fn is_open(port: u16) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
}
