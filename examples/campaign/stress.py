"""What the scenarios of blkif.toml do."""


def unplug(host, guest):
    """A vCPU is taken away and given back while the disk works."""
    guest.run("dd if=/dev/xvda of=/dev/null bs=16k count=256 iflag=direct & echo $! > /tmp/pid")
    for vcpus in (1, 2, 1, 2):
        host.set_vcpus(guest, vcpus)
        guest.run("sleep 0.3")
    result = guest.run("while kill -0 $(cat /tmp/pid); do sleep 1; done 2>/dev/null; grep -c processor /proc/cpuinfo")
    assert result.text.strip() == "2", result.text


def verify(host, guest, rng, timeout):
    """What is written comes back."""

    def work():
        disk = yield from guest.wait_disk("xvda")
        written = {}
        for _ in range(200):
            sector = rng.randrange(disk.sectors)
            written[sector] = rng.randbytes(512)
            yield from disk.write(sector, written[sector])
        for sector, data in written.items():
            assert (yield from disk.read(sector, 1)) == data, f"sector {sector} is another"

    thread = guest.kernel.spawn("verify", work())
    assert host.run(lambda: thread.done, int(timeout * 1e9)), "it takes too long"
    thread.result()
