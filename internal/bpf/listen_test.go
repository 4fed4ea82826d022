package bpf_test

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/internal/bpf"
)

// patience is for what the kernel and another goroutine bring about; a test that needs all of it has failed.
const patience = 2 * time.Minute

// start runs a watcher for the length of the test. As root on a supported kernel it must work: then only a missing right skips.
func start(t *testing.T) *bpf.ListenWatcher {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("watching listens needs root")
	}
	w, err := bpf.NewListenWatcher(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return w
}

// inNamespace runs f on a thread in a network namespace of its own, which ends with it, and returns that namespace's inode.
func inNamespace(t *testing.T, f func(inode uint64)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread dies with the namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		var st syscall.Stat_t
		if err := syscall.Stat("/proc/thread-self/ns/net", &st); err != nil {
			t.Error(err)
			return
		}
		f(st.Ino)
	}()
	<-done
}

// listenOn makes a listening socket by bare system calls, so that it stays on the calling thread's namespace.
func listenOn(t *testing.T, address netip.AddrPort) {
	t.Helper()
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(address.Port())})
	if address.Addr().Is4() {
		sa = &unix.SockaddrInet4{Port: int(address.Port()), Addr: address.Addr().As4()}
	} else {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(address.Port()), Addr: address.Addr().As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, sa); err != nil {
		t.Error(err)
		return
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Error(err)
	}
}

func TestListenIsTold(t *testing.T) {
	w := start(t)
	for _, want := range []string{"0.0.0.0", "127.0.0.1", "::"} {
		t.Run(want, func(t *testing.T) {
			inNamespace(t, func(inode uint64) {
				up(t)
				told, cancel := w.Expect(inode, 8080)
				defer cancel()
				listenOn(t, netip.AddrPortFrom(netip.MustParseAddr(want), 8080))
				select {
				case got := <-told:
					if got.String() != want {
						t.Errorf("told of %s, want %s", got, want)
					}
				case <-time.After(patience):
					t.Error("not told")
				}
			})
		})
	}
}

func TestOnlyWhatIsExpectedIsTold(t *testing.T) {
	w := start(t)
	inNamespace(t, func(inode uint64) {
		otherPort, cancel := w.Expect(inode, 8081)
		defer cancel()
		otherNamespace, cancel := w.Expect(inode+1, 8080)
		defer cancel()
		right, cancel := w.Expect(inode, 8080)
		defer cancel()
		listenOn(t, netip.MustParseAddrPort("0.0.0.0:8080"))
		select {
		case <-right:
		case <-time.After(patience):
			t.Error("not told")
		}
		// Records come in order, so that whatever was wrongly told is there by now.
		if len(otherPort) != 0 || len(otherNamespace) != 0 {
			t.Error("told of another port or namespace")
		}
	})
}

func TestSupported(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := bpf.Supported(); err != nil {
		t.Fatal(err)
	}
}

// up brings loopback up in the thread's namespace.
func up(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		t.Error(err)
		return
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		t.Error(err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{1, 0, 0, 0xf0, 0x90, 0x1f, 2, 0, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{1, 0, 0, 0xf0, 0x90, 0x1f, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 9, 9})
	f.Add([]byte(strings.Repeat("\xff", 24)))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, address, err := bpf.Decode(b)
		if err == nil && net.ParseIP(address) == nil {
			t.Errorf("decoded into address %q", address)
		}
	})
}
