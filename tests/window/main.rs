//! A runner that does nothing but have a window: what the tests of the guard kill, stop and watch.
//!
//! A program that is made of the agent's own code: it drives the runner's half
//! (`guard::client`), and as the guard and its freezers, which are started through `/proc/self/exe`, it is the
//! agent. Where the guard starts `thaw`, it only notes that in the file that stands for the settings.
//!
//! In: `hestner-window SETTINGS JOURNAL WINDOW_MS [--socket PATH] MOUNT...`, then words on standard input.
//! Out: a line for each word: the word and the time of `CLOCK_MONOTONIC` in ns, or `error VARIANT: message`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use hestner_agent::guard::client::{Guard, GuardError, Start, Watch};
use hestner_agent::guard::recovery;
use hestner_agent::platform::fsfreeze;
use tokio::io::{AsyncBufReadExt as _, BufReader};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    match words.iter().skip(1).map(String::as_str).collect::<Vec<_>>()[..] {
        [.., "guard"] | ["freezer", ..] => hestner_agent::cli::main(),
        [.., "guard", "--thaw-socket", _] => hestner_agent::cli::main(),
        ["--config", settings, "thaw"] => note(settings),
        ["left", journal] => left(journal),
        _ => run(words),
    }
}

fn note(settings: &str) -> ExitCode {
    let noted = std::fs::OpenOptions::new().append(true).open(settings).and_then(|mut file| file.write_all(b"thaw\n"));
    if noted.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What recovery finds and does, as a line.
fn left(journal: &str) -> ExitCode {
    match recovery::thaw_left(journal.as_ref()) {
        Ok(left) => println!("{left:?}"),
        Err(error) => println!("error {error:?}"),
    }
    ExitCode::SUCCESS
}

fn run(words: Vec<String>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(window(words));
    ExitCode::SUCCESS
}

async fn window(words: Vec<String>) {
    let [_, settings, journal, window_ms, rest @ ..] = &words[..] else { panic!("not so: {words:?}") };
    let (start, mounts) = match rest {
        [flag, socket, mounts @ ..] if flag == "--socket" => (Start::Socket(socket.into()), mounts),
        mounts => (Start::Process { config: settings.into() }, mounts),
    };
    let watch = Watch {
        run_uid: "window".to_owned(),
        journal: journal.into(),
        mounts: mounts.iter().map(PathBuf::from).collect(),
        window: Duration::from_millis(window_ms.parse().expect("ms")),
    };
    let mut guard = match Guard::arm(&start, watch).await {
        Ok(guard) => {
            say("armed");
            Some(guard)
        }
        Err(error) => return say(&told(&error)),
    };
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let answer = match (line.as_str(), &mut guard) {
            ("begin", Some(guard)) => guard.begin().await.map(|()| "begun".to_owned()),
            ("freeze", Some(guard)) => guard.freeze().await.map(|()| "frozen".to_owned()),
            ("struck", Some(guard)) => {
                guard.struck().await;
                Ok("struck".to_owned())
            }
            ("pid", Some(guard)) => Ok(format!("pid {}", guard.pid().map_or(0, |pid| pid.as_raw()))),
            ("thaw", guard) => match guard.take() {
                Some(guard) => guard.thaw().await.map(|verdict| format!("thawed {}", verdict.frozen.as_nanos())),
                None => Ok("none".to_owned()),
            },
            ("drop", guard) => {
                drop(guard.take());
                Ok("dropped".to_owned())
            }
            // A thread that waits for a frozen filesystem.
            (line, _) if line.starts_with("block ") => {
                let path = PathBuf::from(&line["block ".len()..]);
                std::thread::spawn(move || std::fs::File::create(path).and_then(|mut file| file.write_all(b"x")));
                Ok("blocks".to_owned())
            }
            _ => Ok("what?".to_owned()),
        };
        say(&answer.unwrap_or_else(|error| told(&error)));
    }
}

fn told(error: &GuardError) -> String {
    let debug = format!("{error:?}");
    let variant: String = debug.chars().take_while(|c| c.is_alphanumeric()).collect();
    format!("error {variant}: {error}").replace('\n', " ")
}

fn say(what: &str) {
    println!("{what} {}", fsfreeze::monotonic().as_nanos());
}
