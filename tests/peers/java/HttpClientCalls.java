import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Calls the service with java.net.http.HttpClient and its defaults: over http it sends Upgrade: h2c.
 *
 * <p>Arguments: base URL of the API, folder. Reads encrypt.json and upload from the folder, posts them, and writes
 * the answers there: encrypt.answer, upload.answer, result. Ends with 1 at the first answer that is not 2xx.
 */
public final class HttpClientCalls {
  private static final int POLLS = 1200;
  private static final int POLL_MS = 50;

  private HttpClientCalls() {}

  public static void main(String[] args) throws IOException, InterruptedException {
    String base = args[0];
    Path folder = Path.of(args[1]);

    HttpRequest encrypt =
        HttpRequest.newBuilder(URI.create(base + "/encrypt"))
            .header("Content-Type", "application/json")
            .POST(BodyPublishers.ofFile(folder.resolve("encrypt.json")))
            .build();
    Files.write(folder.resolve("encrypt.answer"), send(encrypt));

    HttpRequest upload =
        HttpRequest.newBuilder(URI.create(base + "/files/encrypt"))
            .POST(BodyPublishers.ofFile(folder.resolve("upload")))
            .build();
    byte[] accepted = send(upload);
    Files.write(folder.resolve("upload.answer"), accepted);

    String job = base + "/jobs/" + field("job_id", accepted);
    for (int poll = 0; poll < POLLS; poll++) {
      String state = field("state", send(HttpRequest.newBuilder(URI.create(job)).build()));
      if (state.equals("succeeded")) {
        byte[] result = send(HttpRequest.newBuilder(URI.create(job + "/result")).build());
        Files.write(folder.resolve("result"), result);
        return;
      }
      Thread.sleep(POLL_MS);
    }
    throw new IOException("the job has not ended");
  }

  /** Sends on a new connection, so that each request asks for the upgrade. */
  private static byte[] send(HttpRequest request) throws IOException, InterruptedException {
    HttpResponse<byte[]> answer = HttpClient.newHttpClient().send(request, BodyHandlers.ofByteArray());
    if (answer.statusCode() / 100 != 2) {
      System.err.println(request.uri() + ": " + answer.statusCode() + " " + new String(answer.body()));
      System.exit(1);
    }
    return answer.body();
  }

  private static String field(String name, byte[] json) {
    Matcher found = Pattern.compile("\"" + name + "\" *: *\"([^\"]*)\"").matcher(new String(json));
    return found.find() ? found.group(1) : "";
  }
}
