//! Contents that are the same at every run: text like a program's source, a database's pages, noise.
//!
//! In: a seed and sizes. Out: bytes, or trees of files. Nothing here is read from the machine, so that two runs
//! on two machines store the same.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Files of one folder; folders stand in hundreds below one another.
const FILES_A_FOLDER: u64 = 100;
/// More than cores: whoever makes files waits for the filesystem's journal at times.
const THREADS: u64 = 4;
/// A page of the database.
pub(crate) const PAGE_BYTES: u64 = 8192;
/// Pages that change together: updates meet where a table is busy.
pub(crate) const PAGES_TOGETHER: u64 = 8;

/// Numbers that look random (SplitMix64, public domain, <https://prng.di.unimi.it/splitmix64.c>).
#[derive(Clone, Debug)]
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let number = self.next().to_le_bytes();
            chunk.copy_from_slice(&number[..chunk.len()]);
        }
    }
}

/// Words of some language of programs; some are much more frequent than others.
pub(crate) struct Words(Vec<String>);

impl Words {
    pub(crate) fn new() -> Self {
        const SYLLABLES: [&str; 24] = [
            "ac", "ba", "con", "de", "ex", "fi", "get", "in", "lo", "map", "net", "ob", "pre", "que", "re", "set",
            "str", "tab", "un", "val", "wri", "read", "ing", "er",
        ];
        let mut numbers = Numbers::new(7);
        let mut word = || {
            let count = 1 + numbers.below(4);
            (0..count).map(|_| SYLLABLES[numbers.below(24) as usize]).collect::<String>()
        };
        Self((0..3000).map(|_| word()).collect())
    }

    /// Appends lines of about so many bytes.
    pub(crate) fn write(&self, numbers: &mut Numbers, bytes: usize, into: &mut Vec<u8>) {
        const BETWEEN: [&str; 8] = [" ", ".", "(", ", ", " = ", "::", ") ", " "];
        let end = into.len() + bytes;
        while into.len() < end {
            let indent = 4 * numbers.below(4) as usize;
            into.extend(std::iter::repeat_n(b' ', indent));
            for _ in 0..2 + numbers.below(7) {
                let count = self.0.len() as u64;
                // The product of two shares: low numbers are frequent.
                let rare = numbers.below(count) * numbers.below(count) / count;
                into.extend_from_slice(self.0[rare as usize].as_bytes());
                into.extend_from_slice(BETWEEN[numbers.below(8) as usize].as_bytes());
            }
            into.extend_from_slice(b";\n");
        }
        into.truncate(end);
    }
}

/// Makes `count` text files of `sizes` bytes below `folder`, all different. Returns how many bytes they have.
pub(crate) fn small_files(folder: &Path, count: u64, sizes: std::ops::Range<u64>) -> io::Result<u64> {
    let words = Words::new();
    let folders = count.div_ceil(FILES_A_FOLDER);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (words, sizes) = (&words, sizes.clone());
                scope.spawn(move || {
                    let mut bytes = 0;
                    for number in (thread..folders).step_by(THREADS as usize) {
                        let first = number * FILES_A_FOLDER;
                        let files = first..(first + FILES_A_FOLDER).min(count);
                        let name = folder.join(format!("part{:03}/unit{:02}", number / 100, number % 100));
                        bytes += one_folder(&name, files, &sizes, words)?;
                    }
                    Ok(bytes)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a writer of files")).sum()
    })
}

fn one_folder(
    folder: &Path,
    files: std::ops::Range<u64>,
    sizes: &std::ops::Range<u64>,
    words: &Words,
) -> io::Result<u64> {
    std::fs::create_dir_all(folder)?;
    let (mut text, mut total) = (Vec::new(), 0);
    for file in files {
        let mut numbers = Numbers::new(file);
        let bytes = sizes.start + numbers.below(sizes.end - sizes.start);
        text.clear();
        words.write(&mut numbers, bytes as usize, &mut text);
        File::create(folder.join(format!("source{file:07}.c")))?.write_all(&text)?;
        total += bytes;
    }
    Ok(total)
}

/// A file of pages as a database has them: a header, rows of text, and about a third that does not compress.
pub(crate) fn database(path: &Path, bytes: u64) -> io::Result<()> {
    let words = Words::new();
    let mut file = io::BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut page = Vec::new();
    for number in 0..bytes / PAGE_BYTES {
        fill_page(&words, number, 0, &mut page);
        file.write_all(&page)?;
    }
    file.flush()
}

/// Changes one page in a hundred, some neighbours at a time; others each round.
pub(crate) fn change_database(path: &Path, round: u32) -> io::Result<()> {
    let words = Words::new();
    let file = File::options().write(true).open(path)?;
    let pages = file.metadata()?.len() / PAGE_BYTES;
    let mut numbers = Numbers::new(u64::from(round) << 32);
    let mut page = Vec::new();
    for _ in 0..pages / 100 / PAGES_TOGETHER {
        let first = numbers.below(pages - PAGES_TOGETHER);
        for number in first..first + PAGES_TOGETHER {
            fill_page(&words, number, round, &mut page);
            file.write_all_at(&page, number * PAGE_BYTES)?;
        }
    }
    Ok(())
}

fn fill_page(words: &Words, number: u64, version: u32, page: &mut Vec<u8>) {
    let mut numbers = Numbers::new((number << 8) ^ u64::from(version));
    page.clear();
    page.extend_from_slice(&number.to_le_bytes());
    page.extend_from_slice(&version.to_le_bytes());
    page.resize(24, 0);
    // What the words make is many times slower than noise; a page repeats its rows in part, as tables do.
    words.write(&mut numbers, 1400, page);
    while page.len() < PAGE_BYTES as usize * 2 / 3 {
        let mut key = [0_u8; 24];
        numbers.fill(&mut key);
        page.extend_from_slice(&key);
        let from = 24 + numbers.below(1200) as usize;
        page.extend_from_within(from..from + 60);
    }
    let noise = page.len();
    page.resize(PAGE_BYTES as usize, 0);
    numbers.fill(&mut page[noise..]);
}

/// A file that nothing compresses.
pub(crate) fn noise(path: &Path, seed: u64, bytes: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut numbers = Numbers::new(seed);
    let mut buffer = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let length = left.min(buffer.len() as u64) as usize;
        numbers.fill(&mut buffer[..length]);
        file.write_all(&buffer[..length])?;
        left -= length as u64;
    }
    Ok(())
}

/// Writes noise over a part of a file.
pub(crate) fn change_noise(path: &Path, seed: u64, from: u64, bytes: u64) -> io::Result<()> {
    let mut part = vec![0; usize::try_from(bytes).expect("a part of a file")];
    Numbers::new(seed).fill(&mut part);
    File::options().write(true).open(path)?.write_all_at(&part, from)
}
