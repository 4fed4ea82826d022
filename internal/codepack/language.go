package codepack

import (
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
)

// The Runtimes that code can be guessed to be for. Others are called as their makers like.
const (
	Python = "python"
	Node   = "node"
	Java   = "java"
	Native = "native"
)

// Guess says which Runtime the code is for, if there is no doubt. What lies at the top decides: files that a project of a language
// has by convention, and programs; where there are none, what the names of sources end in.
func (t *Tree) Guess() (string, error) {
	certain, likely := map[string]string{}, map[string]string{} // a file for each Runtime
	for _, name := range t.names() {
		if strings.Contains(name, "/") || t.entries[name].kind != 0 {
			continue
		}
		language, sure := t.language(name)
		found := likely
		if sure {
			found = certain
		}
		if language != "" && found[language] == "" {
			found[language] = name
		}
	}
	if len(certain) == 0 {
		certain = likely
	}
	languages := slices.Sorted(maps.Keys(certain))
	switch len(languages) {
	case 0:
		return "", fmt.Errorf("nothing at the top of %s tells its runtime; name it by --runtime: python, node, java, native, or another of `hearth runtime ls`", t.path)
	case 1:
		return languages[0], nil
	}
	for i, l := range languages {
		languages[i] = fmt.Sprintf("%s (%s)", l, certain[l])
	}
	return "", fmt.Errorf("%s may be for %s; name its runtime by --runtime", t.path, strings.Join(languages, " or for "))
}

// language tells what a file is of, and whether that makes all the code so.
func (t *Tree) language(name string) (language string, sure bool) {
	switch name {
	case "requirements.txt", "main.py":
		return Python, true
	case "package.json":
		return Node, true
	}
	switch path.Ext(name) {
	case ".py":
		return Python, false
	case ".js", ".mjs", ".cjs":
		return Node, false
	case ".jar", ".java":
		return Java, true
	case ".class":
		return Java, false
	case ".so", ".o", ".a", ".node":
		return "", false // machine code, but no program
	}
	if e := t.entries[name]; (e.executable || t.single) && e.machine() != 0 {
		return Native, true
	}
	return "", false
}

// elfHead is as much of an ELF file as says what it is.
const elfHead = 20

// machine is the number that ELF has for the architecture of a program for Linux, and 0 for what is no such program.
func (e entry) machine() uint16 {
	f, err := e.from.root.OpenFile(e.name, openFlags, 0)
	if err != nil {
		return 0
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode().Type() != fs.FileMode(0) {
		return 0
	}
	head := make([]byte, elfHead)
	if _, err := io.ReadFull(f, head); err != nil {
		return 0
	}
	return elfMachine(head)
}

// elfMachine reads the head of a file: magic, class and byte order, then type (a program is 2, or 3 where it can be loaded
// anywhere) and machine (System V ABI, 4).
func elfMachine(head []byte) uint16 {
	if len(head) < elfHead || string(head[:4]) != "\x7fELF" {
		return 0
	}
	var order binary.ByteOrder = binary.LittleEndian
	if head[5] == 2 {
		order = binary.BigEndian
	}
	if kind := order.Uint16(head[16:]); kind != 2 && kind != 3 {
		return 0
	}
	return order.Uint16(head[18:])
}

// Handler completes the handler that the user named, for a Runtime: where a file is deployed, it is the file that is meant. An
// empty one leaves it to the loader.
func (t *Tree) Handler(language, handler string) (string, error) {
	file := path.Base(t.names()[0])
	stem := strings.TrimSuffix(file, path.Ext(file))
	switch {
	case language == Java && handler == "":
		return "", fmt.Errorf("--handler is missing: which class of %s answers? for example --handler example.Hello", t.path)
	case language == Java && !t.has(".jar", ".class"):
		return "", fmt.Errorf("%s has no jar and no class file: build it first, and deploy the jar, or the folder of jars", t.path)
	case handler != "" || !t.single:
		return handler, nil
	case language == Python:
		return stem + ".main", nil
	case language == Node && file != "index.js":
		return "", fmt.Errorf("--handler is missing: which function of %s answers? for example --handler %s.handler", t.path, stem)
	case language == Native:
		return file, nil
	}
	return "", nil
}

func (t *Tree) has(extensions ...string) bool {
	for name, e := range t.entries {
		if e.kind == 0 && slices.Contains(extensions, path.Ext(name)) {
			return true
		}
	}
	return false
}

// machineOf is ELF's number for what Go calls an architecture, or 0.
func machineOf(goarch string) uint16 {
	switch goarch {
	case "amd64":
		return 62
	case "arm64":
		return 183
	}
	return 0
}

// CheckProgram says what keeps a native handler from being executed on the nodes, which are of this machine's architecture. A single
// file is made executable; in folders that is the user's choice.
func (t *Tree) CheckProgram(handler, goarch string) error {
	if handler == "" {
		handler = "main"
	}
	name := path.Clean(handler)
	e, ok := t.entries[name]
	if t.single && ok {
		e.executable = true
		t.entries[name] = e
	}
	switch {
	case ok && e.kind == fs.ModeSymlink:
		return nil
	case !ok || e.kind != 0:
		return fmt.Errorf("%s has no program %q; name yours by --handler, as it is called below %s", t.path, handler, t.path)
	case !e.executable:
		return fmt.Errorf("%q in %s may not be executed; chmod +x it", handler, t.path)
	}
	if m, want := e.machine(), machineOf(goarch); m != 0 && want != 0 && m != want {
		return fmt.Errorf("%q in %s is a program for another machine (ELF machine %d), and this one is %s; build it for GOARCH=%s", handler, t.path, m, goarch, goarch)
	}
	return nil
}
