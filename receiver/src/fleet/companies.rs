//! Adding a company, with the public half of a recovery key that was made offline, and changing that key.
//!
//! In: a name and the text of a key file. Out: the company and the fingerprint that hosts compare. A file that holds
//! the secret half is refused with a message: whoever has it can open every repository of the company, so it must
//! never come near the centre.

use hestner_proto::identity::recovery_fingerprint;

use super::{Error, Fleet};
use crate::model::{Actor, CompanyId};

const NAME_BYTES_MAX: usize = 200;

/// A company that was added.
#[derive(Clone, Debug)]
pub struct NewCompany {
    /// The row.
    pub id: CompanyId,
    /// What hosts compare at enrolment.
    pub recovery_fingerprint: String,
}

impl Fleet {
    /// Adds a company. `key_file` is the text of the recovery key's file; comments (`#`) may stand in it.
    ///
    /// # Errors
    /// [`Error::RecoveryKey`], [`Error::NameTaken`], [`Error::Invalid`], or the store's.
    pub async fn add_company(&self, actor: Actor, name: &str, key_file: &str) -> Result<NewCompany, Error> {
        let name = name.trim();
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(Error::Invalid(vec![format!("name: 1 to {NAME_BYTES_MAX} printable bytes")]));
        }
        let recipient = read_recipient(key_file)?;
        let fingerprint = recovery_fingerprint(&recipient);
        let now_ms = self.clock.now_ms();
        let mut change = self.store.change(actor, now_ms).await?;
        let id = change.add_company(name, &recipient, &fingerprint, now_ms).await?;
        let id = id.ok_or_else(|| Error::NameTaken(name.to_owned()))?;
        let details = serde_json::json!({ "name": name, "recovery_fingerprint": fingerprint });
        change.commit(Some(id), "company_added", format!("company:{id}"), details).await?;
        Ok(NewCompany { id, recovery_fingerprint: fingerprint })
    }

    /// Puts another recovery key in the place of a company's. Hosts that enrol from now on compare this one; hosts that
    /// are enrolled keep wrapping for theirs until somebody types the new fingerprint there. Returns it.
    ///
    /// # Errors
    /// [`Error::RecoveryKey`], [`Error::NotFound`], or the store's.
    pub async fn set_recovery_key(&self, actor: Actor, company: CompanyId, key_file: &str) -> Result<String, Error> {
        let recipient = read_recipient(key_file)?;
        let fingerprint = recovery_fingerprint(&recipient);
        let mut change = self.store.change(actor, self.clock.now_ms()).await?;
        let before = change.company(company).await?.ok_or(Error::NotFound("company"))?;
        change.set_recovery_key(company, &recipient, &fingerprint).await?;
        let details = serde_json::json!({ "before": before.recovery_fingerprint, "recovery_fingerprint": fingerprint });
        change.commit(Some(company), "recovery_key_changed", format!("company:{company}"), details).await?;
        Ok(fingerprint)
    }
}

/// Reads the one age recipient of a key file.
fn read_recipient(text: &str) -> Result<String, Error> {
    if text.to_ascii_uppercase().contains("AGE-SECRET-KEY") {
        return Err(Error::RecoveryKey(
            "the file holds the secret key, which must stay offline; give the public one (`age-keygen -y FILE`)",
        ));
    }
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return Err(Error::RecoveryKey("the file must hold exactly one age recipient (`age1...`)"));
    };
    let recipient: age::x25519::Recipient =
        line.parse().map_err(|_| Error::RecoveryKey("it is not an age recipient (`age1...`, X25519)"))?;
    Ok(recipient.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_key_is_refused_with_a_clear_message() {
        let file = "# created: 2026-11-22\n# public key: age1x\nAGE-SECRET-KEY-1QQQ\n";
        assert!(read_recipient(file).expect_err("secret").to_string().contains("must stay offline"));
    }

    #[test]
    fn anything_but_one_recipient_is_refused() {
        let key = age::x25519::Identity::generate().to_public().to_string();
        for text in
            [String::new(), "# only\n".into(), "age1short".into(), format!("{key}\n{key}\n"), "ssh-ed25519 A".into()]
        {
            assert!(read_recipient(&text).is_err(), "{text}");
        }
        assert_eq!(read_recipient(&format!("# mine\n  {key}\n")).expect("one"), key);
    }
}
