package stack_test

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

// maxGrowthBytes is how much more memory nodeagent may hold after many Instances than before.
const maxGrowthBytes = 10 << 20

// census counts what a deployment has of everything that an Instance can leave behind.
type census map[string]int64

// memory is counted in bytes: what nodeagent has resident, and what of its heap is in use after a collection of garbage.
const (
	memoryResident = "nodeagent's resident bytes"
	memoryHeap     = "nodeagent's live heap bytes"
)

// takeCensus counts. It fails the test if something cannot be counted.
func (d *deployment) takeCensus(t *testing.T) census {
	t.Helper()
	c := census{}
	for _, process := range marked(d.config.Run) {
		_, name, _ := strings.Cut(process, " ")
		c["processes "+name]++
	}
	for _, daemon := range []string{"nodeagent", "containerd", "poolmanager", "gateway"} {
		pid := d.pid(t, daemon)
		c["descriptors of "+daemon] = entries(t, fmt.Sprintf("/proc/%d/fd", pid))
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
		if err != nil {
			t.Fatal(err)
		}
		c["mounts of "+daemon] = int64(strings.Count(string(mounts), d.config.Root+"/") + strings.Count(string(mounts), d.config.Run+"/"))
		if daemon != "containerd" {
			c["goroutines of "+daemon] = d.profile(t, daemon, "goroutine?debug=1", regexp.MustCompile(`goroutine profile: total (\d+)`))
		}
	}
	for _, dir := range cgroupsOf(t, "hearth-"+d.config.Name) {
		c["cgroups"] += folders(t, dir)
	}
	for _, dir := range []string{d.config.Run, filepath.Join(d.config.Root, "node"), filepath.Join(d.config.Root, "containerd", "io.containerd.grpc.v1.cri")} {
		c["folders in "+filepath.Base(dir)] = folders(t, dir)
	}
	c["links"] = d.links(t)
	c[memoryHeap] = d.profile(t, "nodeagent", "heap?gc=1&debug=1", regexp.MustCompile(`# HeapAlloc = (\d+)`))
	c[memoryResident] = residentBytes(t, d.pid(t, "nodeagent"))
	return c
}

// growth says what there is more of than before, beyond what idle connections and the like account for.
func (c census) growth(before census, memory []string) (out []string) {
	const slack = 10
	for _, what := range slices.Sorted(maps.Keys(c)) {
		allowed := int64(0)
		switch {
		case what == memoryHeap || what == memoryResident:
			if !slices.Contains(memory, what) {
				continue
			}
			allowed = maxGrowthBytes
		case strings.HasPrefix(what, "descriptors") || strings.HasPrefix(what, "goroutines"):
			allowed = slack
		}
		if c[what] > before[what]+allowed {
			out = append(out, fmt.Sprintf("%s: %d, before %d", what, c[what], before[what]))
		}
	}
	return out
}

// grewNot waits until there is no more of anything than before.
func (d *deployment) grewNot(t *testing.T, before census, memory ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), settling)
	defer cancel()
	for {
		now := d.takeCensus(t)
		grown := now.growth(before, memory)
		if len(grown) == 0 {
			t.Logf("census: before %v", before)
			t.Logf("census: after  %v", now)
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("more than before:\n%s", strings.Join(grown, "\n"))
		}
		nap(ctx, 500*time.Millisecond)
	}
}

// profile asks a daemon for one of its profiles and reads a number from it.
func (d *deployment) profile(t *testing.T, name, which string, number *regexp.Regexp) int64 {
	t.Helper()
	client := daemon.UnixClient(filepath.Join(d.config.Run, "admin-"+name+".sock"))
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://hearth/debug/pprof/"+which, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	found := number.FindSubmatch(text)
	if found == nil {
		t.Fatalf("the profile %s of %s has no %s", which, name, number)
	}
	n, err := strconv.ParseInt(string(found[1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// links are the network interfaces that lead to the deployment's Instances.
func (d *deployment) links(t *testing.T) int64 {
	t.Helper()
	addresses, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	prefix, _, _ := strings.Cut(d.status.Subnet, "/")
	network := prefix[:strings.LastIndexByte(prefix, '.')+1]
	var n int64
	for _, a := range addresses {
		if strings.HasPrefix(a.IP.String(), network) {
			n++
		}
	}
	return n
}

func residentBytes(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

func entries(t *testing.T, dir string) int64 {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return int64(len(list))
}

// folders below dir, whatever comes and goes meanwhile.
func folders(t *testing.T, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			n++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}
