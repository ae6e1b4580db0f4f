//! `cargo run --release -p userfault-sim -- [OPTION ...] [TRACE ...]`: see `sim/README.md`.

use std::fs::File;
use std::io::BufReader;
use std::process::ExitCode;

use userfault_sim::memories::{self, Named, Sees};
use userfault_sim::trace::Trace;
use userfault_sim::{made, replay};

const USAGE: &str = "\
usage: userfault-sim [--policy NAME[,NAME...]] [--blocks N | --share PART] [--warm-up N] [TRACE ...]

TRACE is a file that `userfault trace` recorded, or the name of a made trace; none means all made ones.
--policy   which policies; all if it is left out
--blocks   memory in blocks; for a file the limit of its recording, if it is left out
--share    memory as a part of the trace's blocks, such as 0.125
--warm-up  touches that only fill the memory and are not counted; 0 for a file
--list     the names of policies and of made traces
--write    writes the made traces that are named, as files in the current folder";

struct Options {
    policies: Vec<&'static Named>,
    blocks: Option<usize>,
    share: Option<f64>,
    warm_up: Option<usize>,
    traces: Vec<String>,
    write: bool,
}

fn parse(words: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options {
        policies: memories::ALL.iter().collect(),
        blocks: None,
        share: None,
        warm_up: None,
        traces: Vec::new(),
        write: false,
    };
    let mut words = words.peekable();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} wants a value"));
        fn number<T: std::str::FromStr>(text: String) -> Result<T, String> {
            text.parse().map_err(|_| format!("{text} is no number"))
        }
        match word.as_str() {
            "--policy" => {
                options.policies = value()?
                    .split(',')
                    .map(|name| memories::named(name).ok_or(format!("no policy is called {name}")))
                    .collect::<Result<_, _>>()?;
            }
            "--blocks" => options.blocks = Some(number(value()?)?),
            "--share" => options.share = Some(number(value()?)?),
            "--warm-up" => options.warm_up = Some(number(value()?)?),
            "--write" => options.write = true,
            "--list" => {
                for policy in memories::ALL {
                    println!("{:18} {}", policy.name, sees(policy.sees));
                }
                for made in made::ALL {
                    println!("{:18} {}", made.name, made.text);
                }
                return Ok(None);
            }
            "--help" | "-h" => {
                println!("{USAGE}");
                return Ok(None);
            }
            word if word.starts_with('-') => return Err(format!("{word} is no option")),
            _ => options.traces.push(word),
        }
    }
    if options.traces.is_empty() {
        options.traces = made::ALL.iter().map(|made| made.name.to_owned()).collect();
    }
    Ok(Some(options))
}

fn sees(what: Sees) -> &'static str {
    match what {
        Sees::Faults => "sees faults",
        Sees::Touches => "sees every touch",
        Sees::Future => "sees the future",
    }
}

fn run(options: &Options, name: &str) -> Result<(), String> {
    let made = made::ALL.iter().find(|made| made.name == name);
    let (trace, text, meant, warm_up) = match made {
        Some(made) => (made.trace(), made.text, Some(made.capacity), made.warm_up),
        None => {
            let file = File::open(name).map_err(|error| format!("{name}: {error}"))?;
            let trace =
                Trace::read(BufReader::new(file)).map_err(|error| format!("{name}: {error}"))?;
            let meant = trace
                .limit
                .checked_div(trace.block_bytes)
                .map(|blocks| blocks as usize)
                .filter(|blocks| *blocks > 0);
            (trace, "recorded: faults, not every touch", meant, 0)
        }
    };
    if options.write {
        return write(name, &trace).map_err(|error| format!("{name}.trace: {error}"));
    }
    let share = options
        .share
        .map(|share| (trace.blocks as f64 * share) as usize);
    let capacity = options
        .blocks
        .or(share)
        .or(meant)
        .ok_or(format!(
            "{name} does not say how large the memory is: --blocks or --share"
        ))?
        .max(1);
    let warm_up = options.warm_up.unwrap_or(warm_up).min(trace.touches.len());
    println!(
        "\n{name}: {text}; {} touches of {} blocks, memory of {capacity}",
        trace.touches.len(),
        trace.blocks
    );
    if trace.lost > 0 {
        println!("{} events were lost in the recording", trace.lost);
    }
    println!("  of 1,000 touches     misses  minor faults");
    for policy in &options.policies {
        let mut memory = (policy.make)(&trace, capacity);
        let counts = replay(&mut *memory, &trace.touches, warm_up);
        println!(
            "  {:18} {:8.1}  {:8.1}      {}",
            policy.name,
            counts.misses_in_1000(),
            counts.minor_in_1000(),
            sees(policy.sees)
        );
    }
    Ok(())
}

fn write(name: &str, trace: &Trace) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = std::io::BufWriter::new(File::create(format!("{name}.trace"))?);
    writeln!(file, "userfault-trace 1")?;
    writeln!(file, "region 1 4096 {} 0 {name}", trace.blocks)?;
    for (number, block) in trace.touches.iter().enumerate() {
        writeln!(file, "{number} 1 1 {block} t")?;
    }
    file.flush()
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    for name in &options.traces {
        if let Err(error) = run(&options, name) {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
