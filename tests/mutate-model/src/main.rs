//! Puts a switch at every place of a Rust file where a mutant could be, so that one build holds them all.
//!
//! `mutate-model <file.rs> <switched.rs>` writes the file with the switches in it and prints one JSON object a line for
//! each mutant: `{"id", "line", "before", "after"}`. A switch asks `crate::domain::mutant::on(id)`, which the build
//! around the file provides. What types would refuse anyway (another argument order, another field) is not tried, and
//! tests inside the file are left alone.

use std::{env, fs, process::ExitCode};

use proc_macro2::Span;
use quote::quote;
use serde_json::json;
use syn::spanned::Spanned;
use syn::visit_mut::{self, VisitMut};
use syn::{BinOp, Expr, Lit, Stmt, parse_quote};

/// One place to change.
struct Mutant {
    line: usize,
    before: String,
    after: String,
}

struct Switches<'a> {
    lines: Vec<&'a str>,
    found: Vec<Mutant>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [from, to] = arguments.as_slice() else {
        eprintln!("usage: mutate-model <file.rs> <switched.rs>");
        return ExitCode::from(64);
    };
    match switched(from) {
        Ok((text, found)) => {
            if let Err(error) = fs::write(to, text) {
                eprintln!("{to}: {error}");
                return ExitCode::FAILURE;
            }
            for (id, Mutant { line, before, after }) in found.iter().enumerate() {
                println!("{}", json!({ "id": id, "line": line, "before": before, "after": after }));
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{from}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn switched(path: &str) -> Result<(String, Vec<Mutant>), Box<dyn std::error::Error>> {
    let source = fs::read_to_string(path)?;
    let mut file = syn::parse_file(&source)?;
    let mut switches = Switches { lines: source.lines().collect(), found: Vec::new() };
    switches.visit_file_mut(&mut file);
    Ok((prettyplease::unparse(&file), switches.found))
}

impl Switches<'_> {
    /// The condition of a new mutant that puts `text` where `span` is; of what ends on a later line only the first line
    /// is shown.
    fn mutant(&mut self, span: Span, text: &str) -> Expr {
        let (start, end) = (span.start(), span.end());
        let whole = self.lines[start.line - 1];
        let column = |wanted: usize| whole.char_indices().nth(wanted).map_or(whole.len(), |(at, _)| at);
        let tail = if end.line == start.line { &whole[column(end.column)..] } else { " …" };
        let after = format!("{}{text}{tail}", &whole[..column(start.column)]);
        let id = self.found.len();
        self.found.push(Mutant { line: start.line, before: whole.trim().into(), after: after.trim().into() });
        parse_quote!(crate::domain::mutant::on(#id))
    }

    fn binary(&mut self, one: &syn::ExprBinary) -> Option<Expr> {
        let other: BinOp = match one.op {
            BinOp::Lt(_) => parse_quote!(<=),
            BinOp::Le(_) => parse_quote!(<),
            BinOp::Gt(_) => parse_quote!(>=),
            BinOp::Ge(_) => parse_quote!(>),
            BinOp::Eq(_) => parse_quote!(!=),
            BinOp::Ne(_) => parse_quote!(==),
            BinOp::Add(_) => parse_quote!(-),
            BinOp::Sub(_) => parse_quote!(+),
            BinOp::Mul(_) => parse_quote!(+),
            BinOp::Div(_) => parse_quote!(*),
            BinOp::And(_) if !lets(&one.left) && !lets(&one.right) => parse_quote!(||),
            BinOp::Or(_) => parse_quote!(&&),
            BinOp::AddAssign(_) => parse_quote!(-=),
            BinOp::SubAssign(_) => parse_quote!(+=),
            _ => return None,
        };
        let on = self.mutant(one.op.span(), &quote!(#other).to_string());
        let (left, op, right) = (&one.left, &one.op, &one.right);
        Some(parse_quote!((if #on { #left #other #right } else { #left #op #right })))
    }

    fn method(&mut self, one: &syn::ExprMethodCall) -> Option<Expr> {
        let other = opposite(&one.method).filter(|_| one.args.len() <= 1)?;
        let on = self.mutant(one.method.span(), other);
        let mut swapped = one.clone();
        swapped.method = syn::Ident::new(other, one.method.span());
        Some(parse_quote!((if #on { #swapped } else { #one })))
    }
}

/// The method whose answer is the opposite, with arguments of the same types.
fn opposite(method: &syn::Ident) -> Option<&'static str> {
    Some(match method.to_string().as_str() {
        "min" => "max",
        "max" => "min",
        "saturating_sub" => "saturating_add",
        "saturating_add" => "saturating_sub",
        "is_some" => "is_none",
        "is_none" => "is_some",
        "first" => "last",
        "any" => "all",
        _ => return None,
    })
}

/// Whether a condition binds names, which it can only do as it stands.
fn lets(one: &Expr) -> bool {
    match one {
        Expr::Let(_) => true,
        Expr::Binary(binary) => lets(&binary.left) || lets(&binary.right),
        _ => false,
    }
}

fn in_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|one| one.path().is_ident("cfg") && quote!(#one).to_string().contains("test"))
}

impl VisitMut for Switches<'_> {
    fn visit_item_mod_mut(&mut self, item: &mut syn::ItemMod) {
        if !in_tests(&item.attrs) {
            visit_mut::visit_item_mod_mut(self, item);
        }
    }

    // What must be known when it is compiled holds no switch, and patterns hold none either.
    fn visit_item_const_mut(&mut self, _: &mut syn::ItemConst) {}
    fn visit_attribute_mut(&mut self, _: &mut syn::Attribute) {}
    fn visit_pat_mut(&mut self, _: &mut syn::Pat) {}
    fn visit_type_mut(&mut self, _: &mut syn::Type) {}
    fn visit_macro_mut(&mut self, _: &mut syn::Macro) {}

    fn visit_impl_item_fn_mut(&mut self, item: &mut syn::ImplItemFn) {
        if item.sig.constness.is_none() {
            visit_mut::visit_impl_item_fn_mut(self, item);
        }
    }

    /// Turns a condition round that is not made of what is changed by itself.
    fn visit_expr_if_mut(&mut self, one: &mut syn::ExprIf) {
        let plain = match &*one.cond {
            Expr::MethodCall(call) => opposite(&call.method).is_none(),
            Expr::Call(_) | Expr::Field(_) | Expr::Macro(_) | Expr::Path(_) => true,
            _ => false,
        };
        let span = one.cond.span();
        visit_mut::visit_expr_if_mut(self, one);
        if plain {
            let on = self.mutant(span, &format!("!{}", span.source_text().unwrap_or_default()));
            let kept = &one.cond;
            one.cond = parse_quote!((if #on { !(#kept) } else { #kept }));
        }
    }

    fn visit_stmt_mut(&mut self, one: &mut Stmt) {
        let effect = match one {
            Stmt::Expr(Expr::MethodCall(_) | Expr::Call(_) | Expr::Assign(_), Some(_)) => true,
            Stmt::Expr(Expr::Binary(binary), Some(_)) => {
                matches!(binary.op, BinOp::AddAssign(_) | BinOp::SubAssign(_))
            }
            _ => false,
        };
        let span = one.span();
        visit_mut::visit_stmt_mut(self, one);
        if effect {
            let on = self.mutant(span, "");
            let kept = one.clone();
            *one = parse_quote!(if !#on { #kept });
        }
    }

    fn visit_expr_mut(&mut self, one: &mut Expr) {
        let original = one.clone();
        visit_mut::visit_expr_mut(self, one);
        let changed = match (&original, &*one) {
            (Expr::Binary(_), Expr::Binary(binary)) => {
                let binary = binary.clone();
                self.binary(&binary)
            }
            (Expr::MethodCall(_), Expr::MethodCall(method)) => {
                let method = method.clone();
                self.method(&method)
            }
            (Expr::Unary(unary), Expr::Unary(inner)) if matches!(unary.op, syn::UnOp::Not(_)) => {
                let (not, expr) = (inner.clone(), inner.expr.clone());
                let on = self.mutant(unary.op.span(), "");
                Some(parse_quote!((if #on { #expr } else { #not })))
            }
            (Expr::Lit(literal), _) => match &literal.lit {
                Lit::Bool(flag) => {
                    let (value, other) = (flag.value, !flag.value);
                    let on = self.mutant(flag.span, &other.to_string());
                    Some(parse_quote!((if #on { #other } else { #value })))
                }
                Lit::Int(number) if matches!(number.base10_digits(), "0" | "1") => {
                    let other = if number.base10_digits() == "0" { "1" } else { "0" };
                    let changed = syn::LitInt::new(other, number.span());
                    let on = self.mutant(number.span(), other);
                    Some(parse_quote!((if #on { #changed } else { #number })))
                }
                _ => None,
            },
            _ => None,
        };
        if let Some(changed) = changed {
            *one = changed;
        }
    }
}
