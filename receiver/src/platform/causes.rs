//! An error with all its causes, as one line of the log shows it.
//!
//! In: an error. Out: its message and those of its sources, joined by colons. An error that passes its source's
//! message on as its own (`transparent`) is not repeated. Nothing here decides what may be shown to whom.

use std::error::Error;

/// `error` and all that caused it, such as `the store could not commit: database or disk is full`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut last = text.clone();
    let mut source = error.source();
    while let Some(cause) = source {
        let message = cause.to_string();
        if message != last {
            text.push_str(": ");
            text.push_str(&message);
        }
        last = message;
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Middle);

    #[derive(Debug, thiserror::Error)]
    #[error("middle")]
    struct Middle(#[source] std::io::Error);

    #[test]
    fn every_cause_is_named_in_its_order() {
        let error = Outer(Middle(std::io::Error::other("inner")));
        assert_eq!(chain(&error), "outer: middle: inner");
    }
}
