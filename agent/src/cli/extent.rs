//! How much of a repository's data a command reads back, as people say it.

use crate::platform::backoff::random_u64;
use crate::platform::size::Size;
use crate::repository::verify::Extent;

#[derive(Clone, Copy, clap::Args)]
pub(super) struct HowMuch {
    /// Read only so much of the data, chosen anew each time; 0 looks at the structure alone.
    #[arg(long, value_name = "NUMBER", default_value_t = 100, value_parser = clap::value_parser!(u8).range(0..=100))]
    percent: u8,
    /// Read only so much of the data, such as "2 GiB", chosen anew each time.
    #[arg(long, value_name = "SIZE", conflicts_with = "percent")]
    sample: Option<Size>,
}

impl HowMuch {
    pub(super) fn extent(self) -> Extent {
        // Without randomness it is the same choice once more.
        let seed = random_u64().unwrap_or(0);
        match (self.sample.map(Size::bytes), self.percent) {
            (Some(0), _) | (None, 0) => Extent::Structure,
            (Some(bytes), _) => Extent::Bytes { bytes, seed },
            (None, 100) => Extent::All,
            (None, percent) => Extent::Percent { percent: percent.into(), seed },
        }
    }
}
