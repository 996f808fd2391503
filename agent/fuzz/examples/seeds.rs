//! Writes the seed corpora in `seeds/`: `cargo run -p sluice-fuzz --example seeds`. Output is always the same.

use std::fs;
use std::io::Write;
use std::path::Path;

use sluice_fuzz::tar::member;
use sluice_image::erofs::{self, Form};
use sluice_image::index::{IndexOptions, LayerIndex, LayerIndexer, NoSink};
use sluice_image::merge::Tree;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let tars = tars()?;
    for (name, tar) in &tars {
        put("tar", name, &[&[7], tar.as_slice()].concat())?;
        for (packing, layer) in packings(tar)? {
            let target = if packing.starts_with("zstd") { "zstd" } else { "gzip" };
            put(target, &format!("{name}-{packing}"), &[&[64], layer.as_slice()].concat())?;
            let index = index(&layer)?;
            put("index", &format!("{name}-{packing}-blob"), &[&[0], index.blob()].concat())?;
        }
        let sections = sections(&index(tar)?)?;
        put("index", &format!("{name}-sections"), &[&[1], sections.as_slice()].concat())?;
        put("replay", &format!("{name}-sections"), &sections)?;
        for (form, number) in [(Form::Devices, 1), (Form::OneDevice, 2)] {
            put("erofs", &format!("{name}-{number}"), &image(tar, form)?)?;
        }
    }
    for (name, text) in [
        (
            "file",
            r#"{"version":1,"entries":[{"type":"reg","name":"f","size":9,"offset":100,"chunkDigest":"sha256:D"}]}"#,
        ),
        (
            "chunks",
            r#"{"version":1,"entries":[{"type":"dir","name":"d/","mode":493,"modtime":"2001-02-03T04:05:06.5Z"},
               {"type":"reg","name":"d/f","size":9000,"offset":1,"chunkSize":4096,"chunkDigest":"sha256:D","digest":"sha256:D"},
               {"type":"chunk","name":"d/f","offset":99,"chunkOffset":4096,"chunkDigest":"sha256:D","chunkType":"zeros"}]}"#,
        ),
        (
            "kinds",
            r#"{"version":1,"entries":[{"type":"symlink","name":"l","linkName":"../x","xattrs":{"user.a":"d29yZA=="}},
               {"type":"hardlink","name":"h","linkName":"./f"},{"type":"char","name":"c","devMajor":1,"devMinor":3}]}"#,
        ),
    ] {
        put(
            "embedded",
            name,
            &[&[0], text.replace(":D", &format!(":{}", "5a".repeat(32))).as_bytes()].concat(),
        )?;
    }
    put(
        "embedded",
        "annotations",
        format!("\u{1}50:60:70:1\nsha256:{}\n{}", "5a".repeat(32), "x".repeat(99)).as_bytes(),
    )?;
    let mut pieces = vec![2, 0, 3, 20, 40, 5, 40, 6, 0, 7];
    let member = packings(b"content")?.swap_remove(0).1;
    pieces.extend([&[0; 20][..], &member, &vec![0; 40 - member.len()], &member].concat());
    put("embedded", "pieces", &pieces)?;
    for (name, records) in [
        ("names", &b"12 path=a/b\n19 mtime=-1.250000\n15 linkpath=x\n"[..]),
        ("xattr", b"29 SCHILY.xattr.user.x=a=b\n\x00\n"),
        ("ids", b"13 uid=70000\n13 gid=80000\n11 size=10\n"),
        ("map", b"26 GNU.sparse.map=0,4,8,6\n22 GNU.sparse.size=99\n"),
        ("pairs", b"25 GNU.sparse.offset=0\n27 GNU.sparse.numbytes=10\n25 GNU.sparse.size=100\n"),
        ("version1", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n26 GNU.sparse.realsize=9\n"),
    ] {
        put("pax", name, &[&[255], records].concat())?;
        put("pax", &format!("{name}-cut"), &[&[12], records].concat())?;
    }
    // Decoding begins anew at the end of each member, also of the last one.
    let members = packings(&tars[0].1)?.swap_remove(1).1;
    put("gzip", "members-padding", &[&[128], members.as_slice(), &[0; 9]].concat())?;
    put("pack", "two-frames", &[&[40], pack()?.as_slice()].concat())?;
    put("elf", "program", &elf())?;
    documents()
}

/// A program that names an interpreter, a library, and the directory of that.
fn elf() -> Vec<u8> {
    let [interpreter, names] = [&b"/lib/ld-test.so.1\0"[..], b"\0libneeded.so\0$ORIGIN/../lib\0"];
    let mut file = [&b"\x7fELF\x02\x01\x01"[..], &[0; 9]].concat();
    let numbers = |file: &mut Vec<u8>, numbers: &[u64], len: usize| {
        numbers.iter().for_each(|number| file.extend(&number.to_le_bytes()[..len]));
    };
    numbers(&mut file, &[3, 62], 2);
    numbers(&mut file, &[1], 4);
    numbers(&mut file, &[0, 64, 0], 8);
    numbers(&mut file, &[0], 4);
    numbers(&mut file, &[64, 56, 3, 0, 0, 0], 2);
    for (kind, offset, size) in
        [(1, 0, 320 + names.len() as u64), (3, 232, interpreter.len() as u64), (2, 256, 64)]
    {
        numbers(&mut file, &[kind, 4], 4);
        numbers(&mut file, &[offset, offset, offset, size, size, 8], 8);
    }
    file.extend(interpreter);
    file.resize(256, 0);
    // DT_NEEDED, DT_RUNPATH, DT_STRTAB.
    numbers(&mut file, &[1, 1, 29, 14, 5, 320, 0, 0], 8);
    file.extend(names);
    file
}

fn pack() -> Result<Vec<u8>, Failure> {
    let mut pack = sluice_prefetch::PackWriter::default();
    for (layer, store_offset, parts) in [("a", 0, 0), ("b", 4096, 0b1101), ("a", 1 << 20, 0b10)] {
        let layer = sluice_fuzz::index::sha256(layer.as_bytes());
        let chunk = vec![7; 300_000];
        let mut bytes = Vec::new();
        for part in sluice_image::parts::ranges_of(300_000, parts) {
            bytes.extend_from_slice(chunk.get(part.start as usize..part.end as usize).unwrap_or_default());
        }
        let proof = if parts == 0 { Vec::new() } else { sluice_image::parts::prove(&chunk, parts) };
        let bytes = if parts == 0 { chunk } else { bytes }.into();
        pack.push(&sluice_prefetch::Item { layer, store_offset, parts, proof, bytes })?;
    }
    Ok(pack.finish()?)
}

/// Texts, as people, registries and programs write them.
fn documents() -> Result<(), Failure> {
    let digest = format!("sha256:{}", "5a".repeat(32));
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":2}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{digest}","size":9,"annotations":{{"a":"b"}}}}]}}"#
    );
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"User":"a:b","Env":["A=b"],"Entrypoint":["sh"],"ExposedPorts":{{"80/tcp":{{}}}}}},"rootfs":{{"type":"layers","diff_ids":["{digest}"]}}}}"#
    );
    let len = u16::try_from(manifest.len())?.to_le_bytes();
    put("manifest", "one-layer", &[&len, manifest.as_bytes(), config.as_bytes()].concat())?;
    for (name, header) in [
        (
            "bearer",
            &b"\0Bearer realm=\"https://auth.example/token\",service=\"registry\",scope=\"repository:a:pull\""[..],
        ),
        ("basic", b"\0Basic realm=\"a \\\"b\\\"\", Negotiate dG9rZW4="),
        ("seconds", b"\x01120"),
        ("date", b"\x01Wed, 21 Oct 2015 07:28:00 GMT"),
    ] {
        put("challenge", name, header)?;
    }
    for (name, reference) in [
        ("short", "debian"),
        ("tag", "registry.example:5000/team/app:1.2"),
        ("digest", &format!("[::1]:5000/a/b:c@{digest}")),
    ] {
        put("reference", name, reference.as_bytes())?;
    }
    let entry = |created: &str| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":2,"artifactType":"application/vnd.sluice.index.v1","annotations":{{"org.opencontainers.image.created":"{created}"}}}}"#
        )
    };
    let list = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{},{}]}}"#,
        entry("2024-01-02T03:04:05Z"),
        entry("2024-02-30T25:00:00+99:00")
    );
    put("referrers", "two", list.as_bytes())?;
    put(
        "docker_config",
        "auths",
        br#"{"auths":{"registry.example":{"auth":"dTpw"},"https://index.docker.io/v1/":{"identitytoken":"t"},"registry.example:5000":{"username":"u","password":"p"}}}"#,
    )?;
    put(
        "hosts",
        "mirrors",
        b"server = \"https://registry.example\"\n[host.\"http://mirror:5000/v2/x\"]\ncapabilities = [\"pull\", \"resolve\"]\noverride_path = true\nskip_verify = true\n[host.\"http://mirror:5000/v2/x\".header]\nx-a = [\"1\", \"2\"]\n[host.\"other\"]\n",
    )?;
    put(
        "provider",
        "configuration",
        b"\0apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n  - name: p\n    matchImages: [\"*.example\"]\n    defaultCacheDuration: 1h30m\n    apiVersion: credentialprovider.kubelet.k8s.io/v1\n    args: [a]\n    env: [{name: A, value: b}]\n",
    )?;
    for (name, life) in [("answer", "10m"), ("long-answer", "5000000000000000000s")] {
        put(
            "provider",
            name,
            format!(
                "\u{1}{{\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1\",\"kind\":\"CredentialProviderResponse\",\"cacheKeyType\":\"Image\",\"cacheDuration\":\"{life}\",\"auth\":{{\"*.example\":{{\"username\":\"u\",\"password\":\"p\"}}}}}}"
            )
            .as_bytes(),
        )?;
    }
    put(
        "provider",
        "secret",
        br#"{"auths":{"registry.example/team":{"auth":"dTpw"},"registry.example:5000":{"identitytoken":"t"}}}"#,
    )?;
    put(
        "batch",
        "job",
        br#"{"taskGroups":[{"taskCount":"3","parallelism":3,"taskCountPerNode":"3","taskSpec":{"runnables":[{"container":{"imageUri":"registry.example/app:1","commands":["a"],"volumes":["/mnt/x:/x:ro"],"options":"--user 1000 --env A=b","enableImageStreaming":true},"timeout":"1.5s"},{"barrier":{"name":"b"}},{"script":{"text":"echo"},"alwaysRun":true}],"computeResource":{"cpuMilli":"500","memoryMib":64},"maxRetryCount":2,"maxRunDuration":"60s","lifecyclePolicies":[{"action":"RETRY_TASK","actionCondition":{"exitCodes":[1]}}],"environment":{"variables":{"A":"b"}}}}],"logsPolicy":{"destination":"PATH","logsPath":"/mnt/x"},"labels":{"a":"b"}}"#,
    )?;
    for (name, text) in
        [("options", "--user=0 -v /a:/b --env A='b c'"), ("bind", "/a:/b:ro"), ("seconds", "3.5s")]
    {
        put("batch", name, text.as_bytes())?;
    }
    put(
        "faults",
        "all",
        br#"{"path":"/blobs/","status":429,"retry_after":1,"challenge":"Basic","redirect":"http://x/","expires_ms":5,"ignore_ranges":true,"truncate_at":7,"flip":true,"wrong_length":true,"bytes_per_second":5,"stall":true,"times":3,"one_in":2,"refuse":false}"#,
    )?;
    for (kind, name, body) in [
        (
            0,
            "acquire",
            r#"{"reference":"a:1","stream":true,"holder":{"process":7},"start":{"entrypoint":"sh"}}"#,
        ),
        (0, "mount", r#"{"reference":"a:1","stream":false,"holder":{"mount_point":"/mnt"}}"#),
        (3, "release", r#"{"holder":{"snapshot":"1"}}"#),
        (7, "done", r#"{"done":{"result":{"a":[1,2]}}}"#),
        (7, "note", r#"{"event":"note","message":"m"}"#),
    ] {
        put("api", name, &[&[kind], body.as_bytes()].concat())?;
    }
    put("users", "names", b"\x03\x28a:ba:x:1000:1001:A:/home/a:/bin/sh\nroot:x:0b:x:7:a,c\nd:x:8:a\n")?;
    let start = sluice_regress::Start { ready_ns: Some(9), accuracy: Some(0.5), ..Default::default() };
    put("summary", "start", &[&[0x80], serde_json::to_vec(&start)?.as_slice()].concat())?;
    for version in ["trace-v1.bin", "trace-v2.bin"] {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds/trace").join(version);
        for format in 0..5 {
            put(
                "summary",
                &format!("{version}-{format}"),
                &[&[format], fs::read(&golden)?.as_slice()].concat(),
            )?;
        }
    }
    Ok(())
}

fn put(target: &str, name: &str, bytes: &[u8]) -> Result<(), Failure> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    fs::create_dir_all(&dir)?;
    Ok(fs::write(dir.join(name), bytes)?)
}

fn tars() -> Result<Vec<(&'static str, Vec<u8>)>, Failure> {
    let end = vec![0; 1024];
    let files = [
        member(b'5', "d", b""),
        member(b'0', "d/a", b"hello"),
        member(b'0', "d/b", &[7; 5000]),
        member(b'0', "d/c", b"hello"),
        member(b'0', "d/.wh.gone", b""),
        end.clone(),
    ];
    let mut kinds = tar::Builder::new(Vec::new());
    for kind in [tar::EntryType::Link, tar::EntryType::Symlink, tar::EntryType::Char, tar::EntryType::Fifo] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_device_major(1)?;
        header.set_device_minor(3)?;
        kinds.append_link(&mut header, format!("{kind:?}/{}", "n".repeat(120)), "target".repeat(20))?;
    }
    let extended = [
        member(b'x', "x", b"12 path=a/b\n29 SCHILY.xattr.user.x=a=b\n\x00\n"),
        member(b'0', "short", b"0123456789"),
        member(b'L', "l", b"a-long-name\0"),
        member(0, "old/", b""),
        member(b'g', "g", b"12 path=a/b\n"),
        end,
    ];
    Ok(vec![("files", files.concat()), ("kinds", kinds.into_inner()?), ("extended", extended.concat())])
}

fn packings(tar: &[u8]) -> Result<Vec<(&'static str, Vec<u8>)>, Failure> {
    let gzip = |bytes: &[u8], level| -> Result<Vec<u8>, Failure> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
        encoder.write_all(bytes)?;
        Ok(encoder.finish()?)
    };
    let (front, back) = tar.split_at(tar.len() / 2);
    Ok(vec![
        ("gzip", gzip(tar, 6)?),
        ("members", [gzip(front, 1)?, gzip(back, 9)?].concat()),
        ("zstd", zstd::encode_all(tar, 3)?),
        ("zstd-frames", [zstd::encode_all(front, 1)?, zstd::encode_all(back, 9)?].concat()),
        ("stored", gzip(tar, 0)?),
    ])
}

fn index(layer: &[u8]) -> Result<LayerIndex, Failure> {
    let options = IndexOptions { chunk_size: 4096, span_compressed_bytes: 256, span_tar_bytes: 512 };
    let mut indexer = LayerIndexer::new(options, NoSink)?;
    indexer.push(layer)?;
    Ok(indexer.finish(&sluice_fuzz::index::sha256(layer))?.0)
}

/// The input of `sluice_fuzz::index::blob` that gives this index.
fn sections(index: &LayerIndex) -> Result<Vec<u8>, Failure> {
    let header = index.header();
    let raw = |section: &sluice_image::index::header::Section| -> Result<Vec<u8>, Failure> {
        let start = usize::try_from(section.offset.get())?;
        let bytes =
            index.blob().get(start..start + usize::try_from(section.len.get())?).ok_or("no section")?;
        Ok(zstd::bulk::decompress(bytes, usize::try_from(section.raw_len.get())?)?)
    };
    let parts = [raw(&header.skeleton)?, raw(&header.files)?, raw(&header.spans)?];
    let mut out = Vec::new();
    for part in &parts {
        out.extend(u16::try_from(part.len())?.to_le_bytes());
    }
    out.extend(u32::try_from(header.tar_size.get())?.to_le_bytes());
    out.extend(u32::try_from(header.store_size.get() / 4096)?.to_le_bytes());
    out.extend(u16::try_from(header.chunk_count.get())?.to_le_bytes());
    out.extend(u32::try_from(header.entry_count.get())?.to_le_bytes());
    out.extend(u32::try_from(header.layer_size.get())?.to_le_bytes());
    out.extend(parts.concat());
    out.extend([1; 32]);
    Ok(out)
}

fn image(tar: &[u8], form: Form) -> Result<Vec<u8>, Failure> {
    let index = index(tar)?;
    let mut tree = Tree::new();
    let without_links = index.entries()?.filter(|entry| {
        !matches!(entry, Ok(entry) if matches!(entry.kind, sluice_image::entry::EntryKind::HardLink { .. }))
    });
    tree.apply::<Failure>(without_links.map(|entry| entry.map_err(Into::into)))?;
    let mut out = Vec::new();
    erofs::write(&tree, &[index.header().store_size.get() / 4096], form, &mut out)?;
    Ok(out)
}
