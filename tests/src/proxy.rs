//! A proxy in front of an S3 server that refuses, cuts, delays and loses what a test wants.
//!
//! Every connection carries one request. A fault is for the next request of its method and is used up by it.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends amid the body.
    Cut,
    /// `503 SlowDown`.
    Overloaded,
    /// It is carried out and the answer is lost.
    LostAnswer,
    /// Nothing is read any more, and nothing answered.
    Stall,
}

/// A proxy.
pub struct Proxy {
    port: u16,
    state: Arc<State>,
}

struct State {
    upstream: u16,
    faults: Mutex<VecDeque<(&'static str, Fault)>>,
    requests: Mutex<Vec<String>>,
    refuses: AtomicBool,
    breaks_pages: AtomicBool,
    stalled: Mutex<Vec<TcpStream>>,
}

struct Head {
    text: String,
    /// What of the body came with it.
    rest: Vec<u8>,
}

impl Head {
    fn read(client: &mut TcpStream) -> Option<Self> {
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                let rest = bytes.split_off(end + 4);
                return Some(Self { text: String::from_utf8(bytes).ok()?, rest });
            }
            match client.read(&mut buffer).ok()? {
                0 => return None,
                count => bytes.extend_from_slice(&buffer[..count]),
            }
        }
    }

    fn line(&self) -> &str {
        self.text.lines().next().unwrap_or_default()
    }

    fn method(&self) -> &str {
        self.line().split(' ').next().unwrap_or_default()
    }

    fn header(&self, name: &str) -> Option<&str> {
        let named = self.text.lines().filter_map(|line| line.split_once(':'));
        named.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    fn body_bytes(&self) -> u64 {
        self.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0)
    }
}

impl Proxy {
    /// Starts one in front of a port.
    pub fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let state = Arc::new(State {
            upstream,
            faults: Mutex::default(),
            requests: Mutex::default(),
            refuses: AtomicBool::new(false),
            breaks_pages: AtomicBool::new(false),
            stalled: Mutex::default(),
        });
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || state.serve(client));
            }
        });
        Self { port, state }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on refuses to overwrite (a put that is not conditional) and to delete other than locks.
    pub fn refuse(&self) {
        self.state.refuses.store(true, Ordering::SeqCst);
    }

    /// From now on answers no page of a listing but the first.
    pub fn break_pages(&self) {
        self.state.breaks_pages.store(true, Ordering::SeqCst);
    }

    /// A fault for the next request of that method that has none yet.
    pub fn next(&self, method: &'static str, fault: Fault) {
        self.state.faults.lock().expect("a lock").push_back((method, fault));
    }

    /// First lines of the requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.state.requests.lock().expect("a lock").clone()
    }
}

impl State {
    fn serve(&self, mut client: TcpStream) {
        let Some(head) = Head::read(&mut client) else { return };
        self.requests.lock().expect("a lock").push(head.line().to_owned());
        if let Some(status) = self.refusal(&head) {
            return answer(&mut client, &head, status);
        }
        let fault = {
            let mut faults = self.faults.lock().expect("a lock");
            let at = faults.iter().position(|(method, _)| *method == head.method());
            at.and_then(|at| faults.remove(at)).map(|(_, fault)| fault)
        };
        match fault {
            Some(Fault::Overloaded) => answer(&mut client, &head, "503 SlowDown"),
            Some(Fault::Stall) => self.stalled.lock().expect("a lock").push(client),
            Some(Fault::Cut) => drop(self.forward(&mut client, &head, head.body_bytes() / 2)),
            Some(Fault::LostAnswer) => {
                if let Some(mut server) = self.forward(&mut client, &head, head.body_bytes()) {
                    let _ = std::io::copy(&mut server, &mut std::io::sink());
                }
            }
            None => {
                if let Some(mut server) = self.forward(&mut client, &head, head.body_bytes()) {
                    let _ = std::io::copy(&mut server, &mut client);
                }
            }
        }
    }

    fn refusal(&self, head: &Head) -> Option<&'static str> {
        let refuses = self.refuses.load(Ordering::SeqCst);
        let overwrites = head.method() == "PUT" && head.header("if-none-match").is_none();
        let deletes = head.method() == "DELETE" && !head.line().contains("/locks/");
        let is_page = head.line().contains("continuation-token=");
        match () {
            () if refuses && (overwrites || deletes) => Some("403 AccessDenied"),
            () if is_page && self.breaks_pages.load(Ordering::SeqCst) => Some("500 InternalError"),
            () => None,
        }
    }

    /// Sends the head and so much of the body to the server.
    fn forward(&self, client: &mut TcpStream, head: &Head, body_bytes: u64) -> Option<TcpStream> {
        let mut server = TcpStream::connect(("127.0.0.1", self.upstream)).ok()?;
        // Not signed, so that it may be added.
        let text = head.text.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        server.write_all(text.as_bytes()).ok()?;
        let mut body = head.rest.as_slice().chain(client).take(body_bytes);
        std::io::copy(&mut body, &mut server).ok()?;
        Some(server)
    }
}

fn answer(client: &mut TcpStream, head: &Head, status: &str) {
    // All is read first: what is not read when a connection ends takes the answer with it.
    let unread = head.body_bytes().saturating_sub(head.rest.len() as u64);
    let _ = std::io::copy(&mut client.take(unread), &mut std::io::sink());
    let (code, word) = status.split_once(' ').unwrap_or((status, "Refused"));
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{word}</Code><Message>by the proxy</Message></Error>");
    let _ = write!(
        client,
        "HTTP/1.1 {code} {word}\r\nContent-Type: application/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = client.shutdown(Shutdown::Write);
}
