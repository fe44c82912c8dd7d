//! `docs/archive.md`: a page that people write, with parts that benchmarks write.
//!
//! A part stands between `<!-- NAME: ... -->` and `<!-- end of NAME -->`; only what is between is replaced.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

const NAME: &str = "archive.md";

/// The folder of the documentation, beside the sources that this was built from.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

/// Replaces a part of the page.
pub(crate) fn put(folder: &Path, part: &str, content: &str) -> anyhow::Result<()> {
    let path = folder.join(NAME);
    let page = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let Some(changed) = replaced(&page, part, content) else {
        bail!(
            "{} has no part `{part}`: a line `<!-- {part}: ... -->` and one `<!-- end of {part} -->`",
            path.display()
        );
    };
    hestner_tests::files::write(&path, changed);
    eprintln!("written into {}", path.display());
    Ok(())
}

fn replaced(page: &str, part: &str, content: &str) -> Option<String> {
    let begin = page.find(&format!("<!-- {part}:"))?;
    let begin = begin + page[begin..].find("-->")? + "-->".len();
    let end = begin + page[begin..].find(&format!("<!-- end of {part} -->"))?;
    Some(format!("{}\n\n{}\n\n{}", &page[..begin], content.trim(), &page[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let page = "# Title\n<!-- growth: by a tool -->\nold\n<!-- end of growth -->\nend\n";
        let once = replaced(page, "growth", "new\n").unwrap();
        assert_eq!(once, "# Title\n<!-- growth: by a tool -->\n\nnew\n\n<!-- end of growth -->\nend\n");
        assert_eq!(replaced(&once, "growth", "new").unwrap(), once);
        assert_eq!(replaced(page, "archive", "new"), None);
    }
}
