package disk_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/bench/disk"
)

// serves is set where the test's program is to serve a disk, and do nothing else.
const serves = "HEARTH_TEST_SERVES_DISK"

func TestMain(m *testing.M) {
	if os.Getenv(serves) == "" {
		os.Exit(m.Run())
	}
	if err := disk.Serve(os.Args[1], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// place is a folder on a disk, and the command that serves one.
func place(t *testing.T) (parent string, serve []string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs FUSE: ", err)
	}
	parent, err := os.MkdirTemp("/var/tmp", "hearth-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(parent) })
	return parent, []string{"/usr/bin/env", serves + "=1", os.Args[0]}
}

// TestDisk writes and reads back past the page cache.
func TestDisk(t *testing.T) {
	for name, speed := range disk.Named() {
		t.Run(name, func(t *testing.T) {
			parent, serve := place(t)
			d, err := disk.New(t.Context(), parent, speed, serve...)
			if err != nil {
				t.Fatal(err)
			}
			file, data := filepath.Join(d.Dir, "file"), make([]byte, 3<<20)
			for i := range data {
				data[i] = byte(rand.Uint32())
			}
			err = os.WriteFile(file, data, 0o600)
			before := readBytes(t, d)
			if err == nil {
				err = forget(file)
			}
			got, readErr := os.ReadFile(file)
			if err != nil || readErr != nil || !bytes.Equal(got, data) {
				t.Errorf("read %d bytes that are not those written: %v, %v", len(got), err, readErr)
			}
			if n := readBytes(t, d) - before; n < int64(len(data)) {
				t.Errorf("%d bytes came from the device, want all %d", n, len(data))
			}
			m, err := d.Measure(t.Context())
			if err != nil || m.BytesPerSecond <= 0 || m.Latency < speed.Latency || speed.BytesPerSecond > 0 && m.BytesPerSecond > float64(speed.BytesPerSecond) {
				t.Errorf("measured %s, %v; no faster than %+v is right", m, err, speed)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			nothingIn(t, parent)
		})
	}
}

// forget drops a file's pages.
func forget(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fsync(int(f.Fd())); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

func readBytes(t *testing.T, d *disk.Disk) int64 {
	t.Helper()
	n, err := d.ReadBytes()
	if err != nil {
		t.Error(err)
	}
	return n
}

// nothingIn makes sure that no mount, no device and no file is left.
func nothingIn(t *testing.T, parent string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), parent) {
		t.Errorf("mounts are left below %s (%v)", parent, err)
	}
	backing, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range backing {
		if of, err := os.ReadFile(file); err == nil && strings.Contains(string(of), parent) {
			t.Errorf("%s is left: %s", file, of)
		}
	}
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("left in %s: %v, %v", parent, left, err)
	}
}

// TestSweep leaves a disk behind as a process that is killed does, its server dead too, and a file open.
func TestSweep(t *testing.T) {
	parent, serve := place(t)
	d, err := disk.New(t.Context(), parent, disk.Named()["limited"], serve...)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(d.Dir, "open"))
	if err != nil {
		t.Fatal(err)
	}
	if err := disk.Sweep(parent); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("in use"); err != nil {
		t.Errorf("a disk that is in use was swept away: %v", err)
	}
	if err := d.DieForTest(); err != nil {
		t.Fatal(err)
	}
	if err := disk.Sweep(parent); err != nil {
		t.Error(err)
	}
	_ = f.Close()
	nothingIn(t, parent)
}

func TestServeRefuses(t *testing.T) {
	for _, said := range []string{"", "fast", "{}", `{"bytes_per_second": -1}`, `{"bytes_per_second": 1, "latency": -1}`} {
		if err := disk.Serve(t.TempDir(), strings.NewReader(said), os.Stdout); err == nil {
			t.Errorf("served %q", said)
		}
	}
}
