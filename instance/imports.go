package instance

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// Bounds of what is remembered of imports. The loaders that tell of them are in the hands of Functions.
const (
	maxImports        = 256 // of one start
	maxModuleName     = 200
	maxModules        = 2048 // of a Runtime
	maxImporters      = 256  // Functions that are named
	maxImportRuntimes = 64
)

// imports is what the loading of a Function has imported, by its loader's account.
type imports struct {
	Modules importList `json:"modules"`
}

// importedModule is one of them. What it has imported in its turn is within its time.
type importedModule struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
	Image   bool    `json:"image"` // it is the Runtime's and not the Function's
}

// importList has at most maxImports, of proper names, each once.
type importList []importedModule

// UnmarshalJSON implements json.Unmarshaler. It reads as many as there may be.
func (l *importList) UnmarshalJSON(text []byte) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	if open, err := dec.Token(); err != nil || open != json.Delim('[') {
		return errors.New("modules are no list")
	}
	seen := map[string]bool{}
	for n := 0; n < maxImports && dec.More(); n++ {
		var m importedModule
		if err := dec.Decode(&m); err != nil {
			return fmt.Errorf("module %d: %w", n, err)
		}
		if isModule(m.Name) && !seen[m.Name] && m.Seconds >= 0 {
			seen[m.Name] = true
			*l = append(*l, m)
		}
	}
	return nil
}

// isModule says whether a text may be a name in a preload list.
func isModule(name string) bool {
	if name == "" || len(name) > maxModuleName || !utf8.ValidString(name) {
		return false
	}
	for _, r := range name {
		if r == ',' || r == unicode.ReplacementChar || unicode.IsSpace(r) || !unicode.IsGraphic(r) {
			return false
		}
	}
	return true
}

// importBook remembers what Functions have imported, from when the engine was made. The zero value is empty.
type importBook struct {
	mu       sync.Mutex // guards what follows
	runtimes map[string]*runtimeImports
	adds     int64
}

// runtimeImports are those of the newest generation of a Runtime that was heard of.
type runtimeImports struct {
	generation int64
	starts     int64
	functions  map[string]struct{}
	modules    map[string]*moduleImports
	last       int64 // add, by number
}

type moduleImports struct {
	image     bool
	starts    int64
	functions map[string]struct{}
	total     time.Duration
}

// add takes in a start. No module has taken longer than the whole load, which took that long by our own clock.
func (b *importBook) add(of *booted, function string, told imports, load time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := b.runtime(of)
	if r == nil {
		return
	}
	r.starts++
	name(r.functions, function)
	for _, told := range told.Modules {
		m := r.module(told.Name)
		m.image, m.starts = told.Image, m.starts+1
		m.total += time.Duration(min(told.Seconds, load.Seconds()) * float64(time.Second))
		name(m.functions, function)
	}
}

// runtime is what is known of a Runtime; nil if that is of a newer generation.
func (b *importBook) runtime(of *booted) *runtimeImports {
	b.adds++
	r := b.runtimes[of.name]
	if r != nil && r.generation > of.generation {
		return nil
	}
	if r == nil || r.generation < of.generation {
		if b.runtimes == nil {
			b.runtimes = map[string]*runtimeImports{}
		}
		if r == nil && len(b.runtimes) == maxImportRuntimes {
			delete(b.runtimes, slices.MinFunc(slices.Collect(maps.Keys(b.runtimes)), func(x, y string) int {
				return cmp.Compare(b.runtimes[x].last, b.runtimes[y].last)
			}))
		}
		r = &runtimeImports{generation: of.generation, functions: map[string]struct{}{}, modules: map[string]*moduleImports{}}
		b.runtimes[of.name] = r
	}
	r.last = b.adds
	return r
}

// module is that of a name. When there is no more room, one goes that few Functions need: a single one cannot drive out what many use.
func (r *runtimeImports) module(name string) *moduleImports {
	m := r.modules[name]
	if m != nil {
		return m
	}
	if len(r.modules) == maxModules {
		delete(r.modules, slices.MinFunc(slices.Collect(maps.Keys(r.modules)), func(x, y string) int {
			a, b := r.modules[x], r.modules[y]
			return cmp.Or(cmp.Compare(len(a.functions), len(b.functions)), cmp.Compare(a.total, b.total), cmp.Compare(x, y))
		}))
	}
	m = &moduleImports{functions: map[string]struct{}{}}
	r.modules[name] = m
	return m
}

// name adds a Function's name to a set that is not full.
func name(functions map[string]struct{}, function string) {
	if len(functions) < maxImporters {
		functions[function] = struct{}{}
	}
}

// list describes what is known, of one Runtime or of all.
func (b *importBook) list(runtime string) (out []*hearthv1.RuntimeImports) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, n := range slices.Sorted(maps.Keys(b.runtimes)) {
		r := b.runtimes[n]
		if runtime != "" && runtime != n {
			continue
		}
		one := &hearthv1.RuntimeImports{Runtime: n, Generation: r.generation, Starts: r.starts, Functions: slices.Sorted(maps.Keys(r.functions))}
		for _, n := range slices.Sorted(maps.Keys(r.modules)) {
			m := r.modules[n]
			one.Modules = append(one.Modules, &hearthv1.ModuleImports{
				Name: n, InImage: m.image, Starts: m.starts, Functions: slices.Sorted(maps.Keys(m.functions)), Total: durationpb.New(m.total),
			})
		}
		slices.SortStableFunc(one.Modules, func(x, y *hearthv1.ModuleImports) int { return cmp.Compare(y.Total.AsDuration(), x.Total.AsDuration()) })
		out = append(out, one)
	}
	return out
}

// ListImports is NodeService's.
func (e *Engine) ListImports(_ context.Context, req *connect.Request[hearthv1.ListImportsRequest]) (*connect.Response[hearthv1.ListImportsResponse], error) {
	return connect.NewResponse(&hearthv1.ListImportsResponse{Runtimes: e.imports.list(req.Msg.GetRuntime())}), nil
}
