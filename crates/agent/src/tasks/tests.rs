//! Tasks on real files with real keys, headers and jobs; see `lab`.

mod adopt;
mod classes;
mod crashes;
mod lab;
mod rbd;
mod refusals;
mod resumed;
mod uses;
mod whole;
