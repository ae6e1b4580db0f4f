//! Files written by somebody who means harm: every checksum is right, and the numbers are not.
//!
//! A reader may refuse them or read something else than was saved. It may not panic, read elsewhere, take
//! memory without bounds, or run for ever.

mod common;

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use userfault_engine::Pages;
use userfault_engine::tracked::Tracked;
use userfault_snapshot::{Checkpointer, Compress, Directory, OpenPoint, Options, verify};
use xxhash_rust::xxh3::xxh3_64;

use common::{Folder, MIB, Memory, random, settle};

const PAGE: usize = 4096;
const ROUNDS: usize = 120;

fn save(folder: &Folder, compress: Option<Compress>) {
    let mut memory = Memory::Own(Tracked::new(MIB, Pages::Small).unwrap(), MIB);
    let mut state = 9;
    let options = Options {
        drain: false,
        durable: false,
        compress,
        ..Options::default()
    };
    let ck = Checkpointer::open(folder.0.clone(), vec![memory.array("a")], options).unwrap();
    for step in 0..3 {
        for _ in 0..60 {
            let at = random(&mut state) % (MIB);
            memory.bytes()[at] = 1 + (at % 7) as u8;
        }
        ck.save(Some(step), "null".into()).unwrap();
        settle(&ck).unwrap();
    }
    ck.close();
    assert!(ck.ended(Duration::from_secs(10)));
}

/// A number that somebody might try.
fn number(state: &mut u64) -> u64 {
    let edges = [
        0,
        1,
        15,
        16,
        17,
        4095,
        4096,
        4097,
        65_536,
        1 << 30,
        (1 << 30) + 1,
        u64::from(u32::MAX),
        1 << 32,
        1 << 46,
        1 << 62,
        u64::MAX / 2,
        u64::MAX - 1,
        u64::MAX,
    ];
    match random(state) % 3 {
        0 => edges[random(state) % edges.len()],
        1 => random(state) as u64 % 100,
        _ => random(state) as u64,
    }
}

/// All numbers and lists in a document, by path.
fn places(value: &Value, at: String, into: &mut Vec<String>) {
    match value {
        Value::Object(map) => map
            .iter()
            .for_each(|(key, each)| places(each, format!("{at}/{key}"), into)),
        Value::Array(list) => {
            into.push(at.clone());
            list.iter()
                .enumerate()
                .for_each(|(number, each)| places(each, format!("{at}/{number}"), into));
        }
        _ => into.push(at),
    }
}

fn spoil(document: &mut Value, state: &mut u64) {
    let mut all = Vec::new();
    places(document, String::new(), &mut all);
    for _ in 0..1 + random(state) % 2 {
        let place = &all[random(state) % all.len()];
        let Some(target) = document.pointer_mut(place) else {
            continue;
        };
        match (target, random(state) % 8) {
            (Value::Array(list), 0) => list.clear(),
            (Value::Array(list), 1) => {
                list.pop();
            }
            (Value::Array(list), _) => {
                if let Some(first) = list.first().cloned() {
                    list.push(first);
                }
            }
            (other, 0) => *other = Value::String("x".repeat(random(state) % 50)),
            (other, 1) => *other = Value::from(-1),
            (other, 2) => *other = Value::Null,
            (other, _) => *other = Value::from(number(state)),
        }
    }
}

fn write_manifest(folder: &Path, manifest: &Value) {
    let mut bytes = serde_json::to_vec_pretty(manifest).unwrap();
    bytes.push(b'\n');
    let sum = xxh3_64(&bytes);
    bytes.extend_from_slice(format!("xxh3 {sum:016x}\n").as_bytes());
    std::fs::write(folder.join("MANIFEST"), bytes).unwrap();
}

fn manifest(folder: &Path) -> Value {
    let bytes = std::fs::read(folder.join("MANIFEST")).unwrap();
    let end = bytes.len() - "xxh3 0123456789abcdef\n".len();
    serde_json::from_slice(&bytes[..end]).unwrap()
}

fn segment(folder: &Path, number: u64) -> std::path::PathBuf {
    folder.join(format!("segment-{number:010}"))
}

/// Reads everything that can be read.
fn read_all(folder: &Path) {
    let _ = verify(folder, None, &mut |_| true);
    let Ok(directory) = Directory::read(folder) else {
        return;
    };
    for summary in directory.points() {
        let Ok(point) = OpenPoint::open(folder, Some(summary.step)) else {
            continue;
        };
        for data in 0..point.data().len() {
            let Ok(reader) = point.reader(data) else {
                continue;
            };
            let nbytes = reader.record().nbytes;
            let len = nbytes.min(8 << 20) as usize;
            let mut bytes = vec![0; len];
            let _ = reader.read_array(0, &mut bytes, 2);
            let _ = reader.read_array(nbytes - len as u64, &mut bytes, 1);
            let _ = reader.entry(reader.record().blocks() - 1);
        }
    }
}

#[test]
fn numbers_of_a_manifest_are_not_trusted() {
    let folder = Folder::new();
    save(&folder, None);
    let original = manifest(&folder.0);
    let mut state = 77;
    for _ in 0..ROUNDS {
        let mut spoilt = original.clone();
        spoil(&mut spoilt, &mut state);
        write_manifest(&folder.0, &spoilt);
        read_all(&folder.0);
    }
}

#[test]
fn numbers_of_a_record_are_not_trusted() {
    let folder = Folder::new();
    save(&folder, Some(Compress::Lz4));
    let original = manifest(&folder.0);
    let mut state = 78;
    for _ in 0..ROUNDS {
        let mut spoilt = original.clone();
        let last = spoilt["points"].as_array().unwrap().len() - 1;
        let summary = &mut spoilt["points"][last];
        let path = segment(&folder.0, summary["segment"].as_u64().unwrap());
        let bytes = std::fs::read(&path).unwrap();
        let at = summary["record"]["page"].as_u64().unwrap() as usize * PAGE;
        let len = summary["record"]["length"].as_u64().unwrap() as usize;
        let mut record: Value = serde_json::from_slice(&bytes[at..at + len]).unwrap();
        spoil(&mut record, &mut state);
        let text = serde_json::to_vec(&record).unwrap();
        let mut file = bytes.clone();
        file.truncate(at);
        file.extend_from_slice(&text);
        file.resize(file.len().next_multiple_of(PAGE), 0);
        summary["record"]["length"] = Value::from(text.len());
        summary["record"]["hash"] = Value::from(xxh3_64(&text));
        std::fs::write(&path, &file).unwrap();
        write_manifest(&folder.0, &spoilt);
        read_all(&folder.0);
        std::fs::write(&path, &bytes).unwrap();
    }
}

#[test]
fn entries_of_an_index_and_headers_of_blocks_are_not_trusted() {
    for compress in [None, Some(Compress::Lz4), Some(Compress::Zstd)] {
        let folder = Folder::new();
        save(&folder, compress);
        let original = manifest(&folder.0);
        let mut state = 79;
        for round in 0..ROUNDS {
            let mut spoilt = original.clone();
            let last = spoilt["points"].as_array().unwrap().len() - 1;
            let summary = &mut spoilt["points"][last];
            let own = summary["segment"].as_u64().unwrap();
            let path = segment(&folder.0, own);
            let bytes = std::fs::read(&path).unwrap();
            let mut file = bytes.clone();
            let at = summary["record"]["page"].as_u64().unwrap() as usize * PAGE;
            let len = summary["record"]["length"].as_u64().unwrap() as usize;
            let mut record: Value = serde_json::from_slice(&file[at..at + len]).unwrap();
            let directory = &mut record["data"][0]["directory"];
            let root = directory["page"].as_u64().unwrap() as usize * PAGE;
            let leaves = directory["length"].as_u64().unwrap() as usize / 16;
            let entry = root + random(&mut state) % leaves * 16;
            let place = u64::from_le_bytes(file[entry + 8..entry + 16].try_into().unwrap());
            let leaf = (place as u32) as usize * PAGE;
            let own_leaf = place >> 62 == 1 && place << 2 >> 34 == own && leaf + PAGE <= file.len();
            if round % 3 == 0 || !own_leaf {
                file[entry + 8..entry + 16].copy_from_slice(&number(&mut state).to_le_bytes());
            } else {
                // An entry of a leaf, and the leaf's own hash made right.
                let block = leaf + random(&mut state) % 256 * 16;
                if round % 3 == 1 {
                    file[block + 8..block + 16].copy_from_slice(&number(&mut state).to_le_bytes());
                } else {
                    // The header of a block in this segment, if it has one.
                    let place = u64::from_le_bytes(file[block + 8..block + 16].try_into().unwrap());
                    let start = (place as u32) as usize * PAGE;
                    if place >> 62 > 1 && start + 16 <= file.len() {
                        let length = number(&mut state) as u32;
                        file[start..start + 4].copy_from_slice(&length.to_le_bytes());
                        let end = (start + 16 + length as usize).min(file.len());
                        let payload = file[start + 16..end].to_vec();
                        file[start + 8..start + 16]
                            .copy_from_slice(&xxh3_64(&payload).to_le_bytes());
                        if payload.len() > 20 {
                            file[start + 16 + random(&mut state) % 20] ^= random(&mut state) as u8;
                        }
                    }
                }
                let sum = xxh3_64(&file[leaf..leaf + PAGE]);
                file[entry..entry + 8].copy_from_slice(&sum.to_le_bytes());
            }
            directory["hash"] = Value::from(xxh3_64(&file[root..root + leaves * 16]));
            let text = serde_json::to_vec(&record).unwrap();
            file.truncate(at);
            file.extend_from_slice(&text);
            file.resize(file.len().next_multiple_of(PAGE), 0);
            summary["record"]["length"] = Value::from(text.len());
            summary["record"]["hash"] = Value::from(xxh3_64(&text));
            std::fs::write(&path, &file).unwrap();
            write_manifest(&folder.0, &spoilt);
            read_all(&folder.0);
            std::fs::write(&path, &bytes).unwrap();
        }
    }
}

#[test]
fn a_checkpointer_carries_on_from_hostile_files_or_refuses_them() {
    let folder = Folder::new();
    save(&folder, None);
    let original = manifest(&folder.0);
    let mut state = 80;
    let mut memory = Memory::Own(Tracked::new(MIB, Pages::Small).unwrap(), MIB);
    memory.bytes()[5] = 5;
    let mut opened = 0;
    for _ in 0..60 {
        let mut spoilt = original.clone();
        spoil(&mut spoilt, &mut state);
        write_manifest(&folder.0, &spoilt);
        let options = Options {
            drain: false,
            durable: false,
            ..Options::default()
        };
        let array = vec![memory.array("a")];
        let Ok(ck) = Checkpointer::open(folder.0.clone(), array, options) else {
            continue;
        };
        opened += 1;
        if let Ok(point) = ck.save(None, "null".into()) {
            let _ = point.wait(Duration::from_secs(60)).unwrap();
        }
        let _ = settle(&ck);
        ck.close();
        assert!(ck.ended(Duration::from_secs(10)));
    }
    assert!(opened > 0);
}
