//! A bucket of an S3 server as the place of objects, by opendal.
//!
//! An object is stored by one request that the server carries out only if the name is free (`If-None-Match: *`);
//! it is durable when the server says so. Where a server does not know that header, the name is looked up first,
//! and the place says so in its remark. Putting, getting and listing is all that a backup needs: nothing is
//! overwritten, and only [`Storage::remove`] deletes. Packs are sent whole; nothing is left to abort.
//!
//! Never: keys from the environment, the command line, a metadata service or a log; they stand in a file that
//! only root can read.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use opendal::services::S3 as Builder;
use opendal::{Buffer, EntryMode, ErrorKind, HttpTransporter, OperationContext, Operator};
use serde::Deserialize;
use tokio_stream::StreamExt as _;
use zeroize::Zeroize as _;

use super::remote::{Remote, Server};
use super::retry::{Limits, Trouble};
use super::transport::Transport;
use super::{Kind, Object, Storage, StorageError, failed};
use crate::platform::command::printable;
use crate::platform::{chain, trust};

/// Three lines.
const CREDENTIALS_BYTES_MAX: u64 = 16 * 1024;

/// Where a bucket is and who opens it.
#[derive(Clone, Debug)]
pub struct S3Place {
    /// `https://HOST[:PORT]`.
    pub endpoint: String,
    /// Its name.
    pub bucket: String,
    /// What the names of all objects begin with; empty: the bucket holds one repository.
    pub prefix: String,
    /// Part of the signature; `us-east-1` for most servers that know no regions.
    pub region: String,
    /// The bucket is named in the path of requests, and not in the name of the host.
    pub path_style: bool,
    /// TOML: `access_key_id`, `secret_access_key`, and `session_token` where there is one. Only its owner, root or
    /// the user of this process, may read it.
    pub credentials_file: PathBuf,
}

impl fmt::Display for S3Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.endpoint.trim_end_matches('/'), self.bucket, self.prefix)
    }
}

/// Opens a bucket. Speaks to nobody yet.
///
/// # Errors
/// When the credentials are not believed or the place makes no sense.
pub fn s3(place: &S3Place, limits: &Limits) -> Result<Box<dyn Storage>, StorageError> {
    Ok(Box::new(Remote::new(limits, || Bucket::new(place, limits))?))
}

struct Bucket {
    operator: Operator,
    place: String,
    /// Whether the server carries out a put only if the name is free. Believed until it says no.
    is_conditional: AtomicBool,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bucket").field(&self.place).finish()
    }
}

impl Bucket {
    fn new(place: &S3Place, limits: &Limits) -> Result<Self, StorageError> {
        let name = place.to_string();
        let credentials = Credentials::read(&place.credentials_file)?;
        let mut builder = Builder::default()
            .endpoint(&place.endpoint)
            .bucket(&place.bucket)
            .root(&place.prefix)
            .region(&place.region)
            .access_key_id(&credentials.access_key_id)
            .secret_access_key(&credentials.secret_access_key)
            .disable_config_load()
            .disable_ec2_metadata();
        if let Some(token) = &credentials.session_token {
            builder = builder.session_token(token);
        }
        if !place.path_style {
            builder = builder.enable_virtual_host_style();
        }
        let transport = Transport::new(limits).map_err(|e| failed("reach", &name, chain(&e)))?;
        let context = OperationContext::new().with_http_transport(HttpTransporter::new(transport));
        let operator = Operator::new(builder).map_err(|e| failed("use", &name, said(&e)))?.with_context(context);
        Ok(Self { operator, place: name, is_conditional: AtomicBool::new(true) })
    }

    async fn put_if_free(&self, object: &Object, bytes: &Bytes) -> Result<(), Trouble> {
        let path = object.path();
        let is_conditional = self.is_conditional.load(Ordering::Relaxed);
        if !is_conditional {
            match self.size(object).await {
                Ok(_) => return Err(StorageError::Exists(object.clone()).into()),
                Err(Trouble { error: StorageError::Missing(_), .. }) => {}
                Err(trouble) => return Err(trouble),
            }
        }
        let put = self.operator.write_with(&path, Buffer::from(bytes.clone())).if_not_exists(is_conditional).await;
        let Err(error) = put else { return Ok(()) };
        match error.kind() {
            ErrorKind::ConditionNotMatch => Err(StorageError::Exists(object.clone()).into()),
            // Another one puts the same name at this moment; a while later it is there, or not.
            ErrorKind::Conflict => Err(Trouble::passing(failed("store", object, said(&error)))),
            _ if is_conditional && error.to_string().contains("NotImplemented") => {
                self.is_conditional.store(false, Ordering::Relaxed);
                Err(Trouble::passing(failed("store", object, said(&error))))
            }
            _ => Err(trouble("store", object, &error)),
        }
    }
}

impl Server for Bucket {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn remark(&self) -> Option<String> {
        let known = self.is_conditional.load(Ordering::Relaxed);
        (!known).then(|| "the server does not know If-None-Match: two writers of one name can overwrite".to_owned())
    }

    async fn put(&self, object: &Object, bytes: &Bytes) -> Result<(), Trouble> {
        self.put_if_free(object, bytes).await
    }

    async fn settle(&self, _: &Object) -> Result<(), Trouble> {
        // What a server answers for is durable.
        Ok(())
    }

    async fn size(&self, object: &Object) -> Result<u64, Trouble> {
        let metadata = self.operator.stat(&object.path()).await.map_err(|e| trouble("read", object, &e))?;
        Ok(metadata.content_length())
    }

    async fn read(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, Trouble> {
        let path = object.path();
        let read = self.operator.read_with(&path).range(offset..offset.saturating_add(length)).await;
        Ok(read.map_err(|e| trouble("read", object, &e))?.to_vec())
    }

    async fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, Trouble> {
        let folder = format!("{}/", kind.folder());
        let hindered = |error: opendal::Error| Trouble {
            is_passing: error.is_temporary(),
            error: failed("list", kind.folder(), said(&error)),
        };
        let mut lister = self.operator.lister_with(&folder).recursive(true).await.map_err(hindered)?;
        let mut found = Vec::new();
        while let Some(entry) = lister.next().await {
            let entry = entry.map_err(hindered)?;
            if entry.metadata().mode() == EntryMode::FILE {
                found.push((entry.path().to_owned(), entry.metadata().content_length()));
            }
        }
        Ok(found)
    }

    async fn remove(&self, object: &Object) -> Result<(), Trouble> {
        self.operator.delete(&object.path()).await.map_err(|e| trouble("remove", object, &e))
    }
}

fn trouble(operation: &'static str, object: &Object, error: &opendal::Error) -> Trouble {
    let is_passing = error.is_temporary();
    let error = match error.kind() {
        ErrorKind::NotFound => StorageError::Missing(object.clone()),
        _ if is_full(&error.to_string()) => StorageError::Full(object.clone()),
        _ => failed(operation, object, said(error)),
    };
    Trouble { error, is_passing }
}

/// Codes of servers that have no room; S3 itself has none, since Amazon's is never full.
fn is_full(reason: &str) -> bool {
    ["QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "507 "].iter().any(|code| reason.contains(code))
}

/// What went wrong, as one line. Requests, which are signed, are not in it.
fn said(error: &opendal::Error) -> String {
    printable(error.to_string().as_bytes())
}

/// Who opens a bucket. Has no `Debug`: it is the secret.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// Its name.
    pub access_key_id: String,
    /// What signs.
    pub secret_access_key: String,
    /// Where the two are good for a while only.
    #[serde(default)]
    pub session_token: Option<String>,
}

impl Drop for Credentials {
    fn drop(&mut self) {
        self.secret_access_key.zeroize();
        self.session_token.zeroize();
    }
}

impl Credentials {
    /// Reads them.
    ///
    /// # Errors
    /// When the file is not believed, others can read it, or it holds something else.
    pub fn read(path: &Path) -> Result<Self, StorageError> {
        let shown = path.display();
        let text = trust::read_secret(path, CREDENTIALS_BYTES_MAX);
        let text = text.map_err(|e| failed("believe", &shown, chain(&e)))?;
        // The parser's own words would repeat the line that it stumbles over.
        toml::from_str(&text).map_err(|_| {
            failed("understand", shown, "it must have `access_key_id` and `secret_access_key`, as text in quotes")
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::platform::files;

    fn place(folder: &Path, credentials: &str, mode: u32) -> S3Place {
        let file = folder.join("credentials.toml");
        files::write(&file, credentials.as_bytes(), mode).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        S3Place {
            endpoint: "http://127.0.0.1:1".to_owned(),
            bucket: "bucket".to_owned(),
            prefix: "host".to_owned(),
            region: "us-east-1".to_owned(),
            path_style: true,
            credentials_file: file,
        }
    }

    fn trusted_folder() -> tempfile::TempDir {
        // Not below /tmp, which everybody can write.
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        tempfile::tempdir_in(target.canonicalize().unwrap()).unwrap()
    }

    const GOOD: &str = "access_key_id = \"AKID\"\nsecret_access_key = \"very-secret\"\n";

    #[test]
    fn secrets_are_never_shown() {
        let folder = trusted_folder();
        let limits = Limits { tries_max: 1, ..Limits::default() };
        let storage = s3(&place(folder.path(), GOOD, 0o600), &limits).unwrap();
        let error = storage.list(Kind::Key).unwrap_err().to_string();
        for text in [format!("{storage:?}"), storage.place(), error] {
            assert!(!text.contains("very-secret") && !text.contains("AKID"), "{text}");
        }
        // Neither when the file has a mistake.
        let error = s3(&place(folder.path(), "secret_access_key = very-secret", 0o600), &limits).unwrap_err();
        assert!(!error.to_string().contains("very-secret"), "{error}");
    }

    #[test]
    fn credentials_that_others_can_read_are_refused() {
        let folder = trusted_folder();
        let error = s3(&place(folder.path(), GOOD, 0o640), &Limits::default()).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
}
