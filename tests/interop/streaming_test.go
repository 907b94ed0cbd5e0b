package interop

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// bulk is what the large transfers carry each way.
const bulk = 64 << 20

// transports are the two executors that kubectl and crictl choose from.
var transports = map[string]func(string) (remotecommand.Executor, error){
	"spdy": func(raw string) (remotecommand.Executor, error) {
		parsed, err := url.Parse(raw)
		if err != nil {
			return nil, err
		}
		return remotecommand.NewSPDYExecutor(&rest.Config{}, http.MethodPost, parsed)
	},
	"websocket": func(raw string) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutor(&rest.Config{}, http.MethodGet, raw)
	},
	"websocket-v4": func(raw string) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutorForProtocols(&rest.Config{}, http.MethodGet, raw, "v4.channel.k8s.io")
	},
	"websocket-v1": func(raw string) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutorForProtocols(&rest.Config{}, http.MethodGet, raw, "channel.k8s.io")
	},
}

// streamer is a running container and the transport to reach it by.
type streamer struct {
	pod
	container string
	executor  func(string) (remotecommand.Executor, error)
}

func (s streamer) exec(t *testing.T, ctx context.Context, options remotecommand.StreamOptions, command ...string) error {
	t.Helper()
	response, err := s.runtime.Exec(context.Background(), &runtimeapi.ExecRequest{
		ContainerId: s.container, Cmd: command, Tty: options.Tty,
		Stdin: options.Stdin != nil, Stdout: options.Stdout != nil, Stderr: options.Stderr != nil,
	})
	if err != nil {
		t.Errorf("Exec: %v", err)
		return err
	}
	executor, err := s.executor(response.Url)
	if err != nil {
		t.Errorf("executor for %s: %v", response.Url, err)
		return err
	}
	return executor.StreamWithContext(ctx, options)
}

// run executes a script and returns what it wrote.
func (s streamer) run(t *testing.T, stdin io.Reader, script string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	err = s.exec(t, context.Background(), remotecommand.StreamOptions{Stdin: stdin, Stdout: &out, Stderr: &errs},
		"sh", "-c", script)
	return out.String(), errs.String(), err
}

func endedWith(t *testing.T, err error) int {
	t.Helper()
	var ended exec.CodeExitError
	if err == nil {
		return 0
	}
	if !errors.As(err, &ended) {
		t.Errorf("no exit code: %v", err)
		return -1
	}
	return ended.Code
}

func TestStreaming(t *testing.T) {
	d := connect(t)
	p := pod{daemon: d, config: sandboxConfig(t, "streaming"), image: d.testImage(t)}
	p.id = d.runPod(t, p.config)
	main := p.start(t, shell("main", p.image, "nc -ll -p 7 -e cat & exec httpd -f -p 127.0.0.1:8080 -h /etc"))
	eventually(t, "the HTTP server", func() bool {
		script := "wget -q -O /dev/null http://127.0.0.1:8080/passwd && echo x | nc 127.0.0.1 7"
		_, _, err := d.runtime.ExecSync(context.Background(), main, []string{"sh", "-c", script}, time.Minute)
		return err == nil
	})
	for name, executor := range transports {
		s := streamer{p, main, executor}
		t.Run(name, func(t *testing.T) {
			t.Run("exec", s.testOutput)
			t.Run("client killed", s.testClientKilled)
			if name == "websocket-v1" {
				return // no terminal sizes, and its client sees all channels end at once: it may miss the error
			}
			t.Run("missing", s.testMissingCommand)
			t.Run("container killed", s.testContainerKilled)
			t.Run("tty", s.testTerminal)
			if name == "websocket-v4" {
				return // their clients have no way to end stdin
			}
			t.Run("exit codes", s.testExitCodes)
			t.Run("stdin", s.testStdin)
			t.Run("bulk", s.testBulk)
			t.Run("slow reader", s.testSlowReader)
			t.Run("at once", s.testAtOnce)
			t.Run("attach", s.testAttach)
		})
	}
	t.Run("requests", func(t *testing.T) { p.testStreamRequests(t, main) })
	t.Run("portforward spdy", func(t *testing.T) { p.testPortForward(t, spdyDialer) })
	t.Run("portforward tunnel", func(t *testing.T) { p.testPortForward(t, tunnelDialer) })
}

func (s streamer) testOutput(t *testing.T) {
	out, errs, err := s.run(t, nil, "echo to stdout; echo to stderr >&2; printf '\\377\\000\\n'")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "stdout", out, "to stdout\n\xff\x00\n")
	equal(t, "stderr", errs, "to stderr\n")
}

func (s streamer) testExitCodes(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 3": 3, "exit 255": 255, "kill -9 $$": 137} {
		_, _, err := s.run(t, nil, script)
		equal(t, script, endedWith(t, err), want)
	}
}

func (s streamer) testMissingCommand(t *testing.T) {
	var out bytes.Buffer
	err := s.exec(t, context.Background(), remotecommand.StreamOptions{Stdout: &out}, "/no/such/command")
	if err == nil || !strings.Contains(err.Error(), "/no/such/command") {
		t.Errorf("the error does not name the command: %v", err)
	}
}

func (s streamer) testStdin(t *testing.T) {
	out, _, err := s.run(t, strings.NewReader("line\nno newline"), "cat; echo '|end'")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "stdout", out, "line\nno newline|end\n")
	// A command that ends before its stdin does.
	endless, stop := io.Pipe()
	defer stop.Close()
	_, _, err = s.run(t, endless, "exit 4")
	equal(t, "exit code", endedWith(t, err), 4)
	// And one that closes it while much more is on its way.
	out, _, err = s.run(t, io.LimitReader(rand.New(rand.NewSource(1)), 8<<20), "exec <&-; sleep 0.2; echo done")
	if err != nil || out != "done\n" {
		t.Errorf("%q, %v", out, err)
	}
}

func (s streamer) testBulk(t *testing.T) {
	sent, received := sha256.New(), sha256.New()
	source := io.TeeReader(io.LimitReader(rand.New(rand.NewSource(42)), bulk), sent)
	count := &counter{}
	began := time.Now()
	options := remotecommand.StreamOptions{Stdin: source, Stdout: io.MultiWriter(received, count)}
	if err := s.exec(t, context.Background(), options, "cat"); err != nil {
		t.Fatal(err)
	}
	t.Logf("%.1f MB/s each way", bulk/1e6/time.Since(began).Seconds())
	equal(t, "octets", count.n, bulk)
	if !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
		t.Error("what came back is not what was sent")
	}
}

type counter struct{ n int }

func (c *counter) Write(data []byte) (int, error) {
	c.n += len(data)
	return len(data), nil
}

// slow takes nothing until it is opened.
type slow struct {
	open <-chan struct{}
	counter
}

func (s *slow) Write(data []byte) (int, error) {
	<-s.open
	return s.counter.Write(data)
}

func (s streamer) testSlowReader(t *testing.T) {
	open := make(chan struct{})
	time.AfterFunc(2*time.Second, func() { close(open) })
	sink := &slow{open: open}
	const size = 32 << 20
	options := remotecommand.StreamOptions{Stdout: sink}
	if err := s.exec(t, context.Background(), options, "head", "-c", fmt.Sprint(size), "/dev/zero"); err != nil {
		t.Fatal(err)
	}
	equal(t, "octets", sink.n, size)
}

func (s streamer) testAtOnce(t *testing.T) {
	var group sync.WaitGroup
	for n := range 20 {
		group.Add(1)
		go func() {
			defer group.Done()
			word := fmt.Sprintf("session %d", n)
			out, _, err := s.run(t, strings.NewReader(word), fmt.Sprintf("cat; exit %d", n))
			equal(t, "exit code", endedWith(t, err), n)
			equal(t, "stdout", out, word)
		}()
	}
	group.Wait()
}

func (s streamer) alive(t *testing.T, mark string) bool {
	t.Helper()
	out, _, err := s.runtime.ExecSync(context.Background(), s.container, []string{"ps", "-o", "args"}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(out), mark)
}

func (s streamer) testClientKilled(t *testing.T) {
	ctx, kill := context.WithCancel(context.Background())
	defer kill()
	mark := fmt.Sprintf("sleep %d", 100000+rand.Intn(100000))
	started := make(chan struct{})
	var once sync.Once
	sink := writer(func(data []byte) { once.Do(func() { close(started) }) })
	ended := make(chan error, 1)
	go func() {
		ended <- s.exec(t, ctx, remotecommand.StreamOptions{Stdout: sink}, "sh", "-c", "echo here; "+mark+"; true")
	}()
	<-started
	if !s.alive(t, mark) {
		t.Error("the command does not run")
	}
	kill()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the session ended with %v", err)
	}
	eventually(t, "the command's end", func() bool { return !s.alive(t, mark) })
}

type writer func([]byte)

func (w writer) Write(data []byte) (int, error) {
	w(data)
	return len(data), nil
}

func (s streamer) testContainerKilled(t *testing.T) {
	victim := streamer{s.pod, "", s.executor}
	victim.container = s.start(t, shell(fmt.Sprintf("victim%d", time.Now().UnixNano()), s.image, "sleep 100000"))
	started := make(chan struct{})
	var once sync.Once
	sink := writer(func(data []byte) { once.Do(func() { close(started) }) })
	ended := make(chan error, 1)
	go func() {
		options := remotecommand.StreamOptions{Stdout: sink}
		ended <- victim.exec(t, context.Background(), options, "sh", "-c", "echo here; sleep 100000; true")
	}()
	<-started
	if err := s.runtime.StopContainer(context.Background(), victim.container, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a session that was killed ended well")
		}
		t.Logf("ended with %v", err)
	case <-time.After(time.Minute):
		t.Error("the session did not end with its container")
	}
}

type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

func (s streamer) testTerminal(t *testing.T) {
	queue := make(sizes, 2)
	queue <- remotecommand.TerminalSize{Width: 80, Height: 24}
	var out lockedBuffer
	input, keyboard := io.Pipe()
	defer keyboard.Close()
	ended := make(chan error, 1)
	go func() {
		options := remotecommand.StreamOptions{Stdin: input, Stdout: &out, Tty: true, TerminalSizeQueue: queue}
		ended <- s.exec(t, context.Background(), options, "sh", "-c",
			"trap 'stty size; exit 5' WINCH; test -t 0 && test -t 1 && test -t 2 && echo terminal; "+
				"while :; do sleep 0.1; done")
	}()
	eventually(t, "the terminal", func() bool { return strings.Contains(out.String(), "terminal") })
	queue <- remotecommand.TerminalSize{Width: 100, Height: 40}
	close(queue)
	select {
	case err := <-ended:
		if s.hasExitCodes(err) {
			equal(t, "exit code", endedWith(t, err), 5)
		}
	case <-time.After(time.Minute):
		t.Errorf("the command did not see the new size: %q", out.String())
	}
	if !strings.Contains(out.String(), "40 100") && !strings.Contains(out.String(), "24 80") {
		t.Errorf("the terminal's size is not what was set: %q", out.String())
	}
}

// hasExitCodes tells whether an error is of a protocol that carries them.
func (s streamer) hasExitCodes(err error) bool {
	var ended exec.CodeExitError
	return errors.As(err, &ended)
}

type lockedBuffer struct {
	mutex  sync.Mutex
	buffer bytes.Buffer
}

func (b *lockedBuffer) Write(data []byte) (int, error) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.buffer.Write(data)
}

func (b *lockedBuffer) String() string {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.buffer.String()
}

func (s streamer) testAttach(t *testing.T) {
	config := shell(fmt.Sprintf("attached%d", time.Now().UnixNano()), s.image, "while read line; do echo got $line; done; echo end")
	config.Stdin, config.StdinOnce = true, true
	id := s.start(t, config)
	response, err := s.runtime.Attach(context.Background(), &runtimeapi.AttachRequest{
		ContainerId: id, Stdin: true, Stdout: true, Stderr: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	executor, err := s.executor(response.Url)
	if err != nil {
		t.Fatal(err)
	}
	var out, errs lockedBuffer
	input, keyboard := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		options := remotecommand.StreamOptions{Stdin: input, Stdout: &out, Stderr: &errs}
		ended <- executor.StreamWithContext(context.Background(), options)
	}()
	for _, line := range []string{"one", "two"} {
		fmt.Fprintln(keyboard, line)
		eventually(t, "the answer to "+line, func() bool { return strings.Contains(out.String(), "got "+line+"\n") })
	}
	keyboard.Close()
	if err := <-ended; err != nil {
		t.Errorf("attach ended with %v", err)
	}
	equal(t, "stdout", out.String(), "got one\ngot two\nend\n")
	equal(t, "exit code", s.exited(t, id).ExitCode, 0)
}

func (p pod) testStreamRequests(t *testing.T, main string) {
	ctx := context.Background()
	_, err := p.runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: noSuchID, Cmd: []string{"x"}, Stdout: true})
	refused(t, err, codes.NotFound, noSuchID[:12])
	_, err = p.runtime.Exec(ctx, &runtimeapi.ExecRequest{Cmd: []string{"x"}, Stdout: true})
	refused(t, err, codes.InvalidArgument, "container_id")
	_, err = p.runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: main, Cmd: []string{"x"}})
	refused(t, err, codes.InvalidArgument, "stdout")
	_, err = p.runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: main, Stdout: true})
	refused(t, err, codes.InvalidArgument, "cmd")
	_, err = p.runtime.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: main, Stdout: true, Stderr: true, Tty: true})
	refused(t, err, codes.InvalidArgument, "tty")
	created := p.create(t, shell("created", p.image, "true"))
	_, err = p.runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: created, Cmd: []string{"x"}, Stdout: true})
	refused(t, err, codes.FailedPrecondition, "created")
	_, err = p.runtime.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: noSuchID})
	refused(t, err, codes.NotFound, noSuchID[:12])

	// A URL serves one request.
	response, err := p.runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: main, Cmd: []string{"true"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		executor, err := transports["spdy"](response.Url)
		if err != nil {
			t.Fatal(err)
		}
		err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: io.Discard})
		if (err == nil) != (n == 0) {
			t.Errorf("use %d of a URL: %v", n+1, err)
		}
	}
}

func spdyDialer(parsed *url.URL) (httpstream.Dialer, error) {
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		return nil, err
	}
	return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, parsed), nil
}

func tunnelDialer(parsed *url.URL) (httpstream.Dialer, error) {
	return portforward.NewSPDYOverWebsocketDialer(parsed, &rest.Config{})
}

// forwarded starts a port-forward and returns the local address of each port.
func (p pod) forwarded(t *testing.T, makeDialer func(*url.URL) (httpstream.Dialer, error), ports ...string) []string {
	t.Helper()
	response, err := p.runtime.PortForward(context.Background(), &runtimeapi.PortForwardRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := url.Parse(response.Url)
	if err != nil {
		t.Fatal(err)
	}
	dialer, err := makeDialer(parsed)
	if err != nil {
		t.Fatal(err)
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	var errs lockedBuffer
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, ports, stop, ready, io.Discard, &errs)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatalf("port-forward: %v", err)
	}
	t.Cleanup(func() { close(stop); <-ended })
	found, err := forwarder.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	addresses := []string{}
	for _, port := range found {
		addresses = append(addresses, fmt.Sprintf("127.0.0.1:%d", port.Local))
	}
	return addresses
}

// echo sends octets through a forwarded port, half-closes, and returns what came back.
func echo(address string, source io.Reader, sink io.Writer) error {
	connection, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	return echoOn(connection, source, sink)
}

func echoOn(connection net.Conn, source io.Reader, sink io.Writer) error {
	defer connection.Close()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(connection, source)
		_ = connection.(*net.TCPConn).CloseWrite()
		sent <- err
	}()
	if _, err := io.Copy(sink, connection); err != nil {
		return err
	}
	return <-sent
}

func (p pod) testPortForward(t *testing.T, dialer func(*url.URL) (httpstream.Dialer, error)) {
	t.Run("loopback only", func(t *testing.T) {
		address := p.forwarded(t, dialer, ":8080")[0]
		answer, err := http.Get("http://" + address + "/passwd")
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil || !strings.HasPrefix(string(body), "root:") {
			t.Errorf("%q, %v", body, err)
		}
	})
	t.Run("200 connections", func(t *testing.T) {
		address := p.forwarded(t, dialer, ":7")[0]
		var group sync.WaitGroup
		began := time.Now()
		connections := []net.Conn{}
		for n := range 200 {
			// One by one until the server has it: busybox's nc has room for one connection that it has not accepted.
			connection, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			first := []byte{'x'}
			if _, err = connection.Write(first); err == nil {
				_, err = io.ReadFull(connection, first)
			}
			if err != nil {
				t.Fatalf("connection %d: %v", n, err)
			}
			connections = append(connections, connection)
		}
		t.Logf("%.1f ms a connection", float64(time.Since(began).Milliseconds())/200)
		for n, connection := range connections {
			group.Add(1)
			go func() {
				defer group.Done()
				want := strings.Repeat(fmt.Sprintf("connection %d;", n), 1000)
				var got bytes.Buffer
				if err := echoOn(connection, strings.NewReader(want), &got); err != nil {
					t.Errorf("connection %d: %v", n, err)
				} else if got.String() != want {
					t.Errorf("connection %d: %d octets of %d came back", n, got.Len(), len(want))
				}
			}()
		}
		group.Wait()
	})
	t.Run("bulk", func(t *testing.T) {
		address := p.forwarded(t, dialer, ":7")[0]
		sent, received := sha256.New(), sha256.New()
		began := time.Now()
		source := io.TeeReader(io.LimitReader(rand.New(rand.NewSource(7)), bulk), sent)
		if err := echo(address, source, received); err != nil {
			t.Fatal(err)
		}
		t.Logf("%.1f MB/s each way", bulk/1e6/time.Since(began).Seconds())
		if !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
			t.Error("what came back is not what was sent")
		}
	})
	t.Run("closed port", func(t *testing.T) {
		address := p.forwarded(t, dialer, ":9")[0]
		var got bytes.Buffer
		_ = echo(address, strings.NewReader("x"), &got)
		equal(t, "octets", got.Len(), 0)
	})
}
